"""Locate-then-edit as published, plainly: what errata's editors are compared with, for their numbers (a test) and their time (locate.py).

Every optimisation step runs the whole model over all contexts, all tokens and the whole vocabulary, forward and backward, one fact at a
time; keys and hidden states are taken by whole runs, one of each for each layer, with the weights written in place between them; every
write is a dense [d_in, d_in] solve in float64; K_p K_pᵀ and Δ_hist are dense, and each constrained edit of DeltaEdit decomposes anew.

ROME (arXiv 2202.05262), MEMIT (2210.07229), RECT (2401.04700), AlphaEdit (2410.02355), DeltaEdit (§4.2, Algorithm 1, with what its
authors' code makes of it; without patience, strict and retry, which are errata's own). Of errata it takes settings, prompts and prefixes,
second moments and hooks, so that both do the same job; neither its search nor its sweep, write rules or histories. Two things are
errata's and not the published code's, or the numbers could not be the same: `steps` counts updates (the published loops make one less),
and the moments carry errata's jitter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from errata.facts import Fact
from errata.lm.anatomy import matrix
from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.model import LanguageModel
from errata.lm.tokens import Encoded
from errata.methods import MEMIT, RECT, ROME, AlphaEdit, DeltaEdit
from errata.methods.locate.contexts import Request, prefixes, request
from errata.statistics.moments import moments_for

JITTER = 1e-8  # of errata's inverse_prior
ZERO = 1e-12  # an eigenvalue of Δ_hist Δ_histᵀ up to this share of the largest is rounding


@dataclass(slots=True)
class Made:
    """One edit: p(target) of each fact, updates that each took, seconds of the stages keys, value and write, constrained facts."""

    probability: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    constrained: int = 0


class Plain:
    """A sequence of edits, each written into the weights of `lm` at once: give it a model of its own.

    method: ROME, MEMIT (with history or without), RECT, AlphaEdit, or DeltaEdit without patience, strict and retry.
    """

    def __init__(self, lm: LanguageModel, method: ROME | MEMIT | AlphaEdit) -> None:
        self.lm, self.method = lm, method.for_model(lm)
        if isinstance(self.method, DeltaEdit):
            assert self.method.patience is None and self.method.retry is None and not self.method.strict, "settings of errata's own"
        lm.model.requires_grad_(False)
        self.layers = self.method.layers or ()
        self.down = [lm.anatomy.mlp_down[layer] for layer in self.layers]
        # The value is added to the MLP's output in ROME, to the layer's in the others.
        self.site = self.down[-1] if isinstance(self.method, ROME) else lm.anatomy.layers[self.layers[-1]]
        self.prefixes = prefixes(lm, self.method.prefixes, self.method.prefix_length)
        d, d_in = lm.anatomy.hidden_size, lm.anatomy.key_size
        self.fixed = [self._fixed(layer, d_in) for layer in self.layers]  # λC, C or P of each layer [d_in, d_in]
        self.earlier = [torch.zeros(d_in, d_in, dtype=torch.float64) for _ in self.layers]  # K_p K_pᵀ
        self.added = torch.zeros(d, d_in, dtype=torch.float64)  # Δ_hist, of the last layer
        self.mean = self.variance = 0.0
        self.count, self.started = 0, getattr(self.method, "start_at", "zero") == "zero"

    def _fixed(self, layer: int, d_in: int) -> tuple[Tensor, float]:
        """What must not move: the matrix, and AlphaEdit's L2."""
        method = self.method
        if isinstance(method, ROME) and not method.whiten:
            return torch.eye(d_in, dtype=torch.float64), 0.0
        c = moments_for(self.lm, self.layers, corpus=method.corpus, tokens=method.tokens).mean(layer)
        if isinstance(method, AlphaEdit):
            u, values, _ = torch.linalg.svd(c)  # from the largest
            count = round(method.share * d_in) if method.threshold is None else int((values < method.threshold).sum())
            p = u[:, d_in - count :] @ u[:, d_in - count :].T
            return p, float((p @ c).trace()) / 10 if method.l2 is None else method.l2
        weight = 1.0 if isinstance(method, ROME) else float(d_in) if method.weight is None else method.weight
        return weight * (c + JITTER * c.diagonal().mean() * torch.eye(d_in, dtype=torch.float64)), 0.0

    def edit(self, facts: Sequence[Fact]) -> Made:
        """Facts that are written together; their values are found one after the other."""
        made = Made(seconds={"keys": 0.0, "value": 0.0, "write": 0.0})
        requests = [request(self.lm, fact, self.prefixes) for fact in facts]
        clock = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            made.seconds[stage] += now - clock
            clock = now

        keys = None
        if isinstance(self.method, DeltaEdit):
            keys = self._contexts(requests, self.down[-1])[:, 0] if self.method.key == "bare" else self._keys(requests, -1)
        noises = [] if keys is None else [self.added @ key for key in keys.double()]  # Δ_hist k_e [d] of each fact
        lap("keys")
        targets = []
        for i, one in enumerate(requests):
            directions = self._directions(noises[i]) if noises and self._outside(noises[i]) else None
            made.constrained += directions is not None
            targets.append(self._value(one, directions, made))
        lap("value")
        for i in range(len(self.layers)):
            k = self._keys(requests, i)  # [F, d_in]
            missing = torch.stack(targets) - self._reached(requests, k)
            lap("keys")
            self._write(i, k, missing / (len(self.layers) - i), requests)
            lap("write")
        for noise in noises:  # each fact is an edit of its own, but those of a batch are asked before any is learnt from
            self._learn(noise)
        if isinstance(self.method, AlphaEdit) or getattr(self.method, "history", False):
            for i in range(len(self.layers)):
                k = self._keys(requests, i).double()  # once more, on the edited model
                self.earlier[i] += k.T @ k
        lap("keys")
        return made

    def _value(self, one: Request, directions: Tensor | None, made: Made) -> Tensor:
        """v₀ + δ [d]: Adam on δ, the whole model over all contexts and "{subject} is a"."""
        method, texts = self.method, [replace(text, ids=text.ids[:-1]) for text in one.contexts]
        assert method.steps is not None and method.lr is not None and method.decay is not None and method.clamp is not None
        batch = self.lm.batch([*texts, replace(one.essence, ids=one.essence.prompt_ids)])
        shape, rows = batch.input_ids.shape, torch.arange(len(batch))
        delta = torch.zeros(self.lm.anatomy.hidden_size, dtype=self.lm.dtype, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=method.lr)
        base = before = None

        def add(output: Tensor) -> Tensor:
            nonlocal base
            states = output.reshape(*shape, -1)
            base = states[0, batch.subject_last[0]].detach().clone() if base is None else base
            return torch.zeros_like(states).index_put((rows, batch.subject_last), delta.expand(len(rows), -1)).reshape(output.shape)

        for step in range(method.steps + 1):
            with add_to_output(submodule(self.lm.model, self.site), add):
                logits = self.lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            logs = torch.log_softmax(logits, -1)  # [C + 1, T, V]
            told = [
                logs[c, text.prompt_length - 1 : len(text.ids) - 1].gather(-1, torch.tensor(text.target_ids)[:, None])
                for c, text in enumerate(one.contexts)
            ]
            now = logs[-1, one.essence.prompt_length - 1]
            before = now.detach() if before is None else before
            loss = -torch.stack([each.mean() for each in told]).mean() + method.kl * (now.exp() * (now - before)).sum()
            assert base is not None
            loss = loss + method.decay * delta.norm() / base.norm() ** 2
            probability = float(told[0].detach().sum().exp())
            likely = method.enough is not None and probability > method.enough
            if step == method.steps or float(loss.detach()) < method.stop or likely:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                if directions is not None:
                    delta.sub_(directions @ (directions.T @ delta))
                if delta.norm() > method.clamp * base.norm():
                    delta.mul_(method.clamp * base.norm() / delta.norm())
        made.probability.append(probability)
        made.steps.append(step)
        assert base is not None
        return base + delta.detach()

    def _write(self, i: int, k: Tensor, residual: Tensor, requests: list[Request]) -> None:
        """W ← W + Rᵀ β. k [F, d_in], residual [F, d]."""
        module = submodule(self.lm.model, self.down[i])
        beta = self._beta(i, k.double(), requests)
        change = residual.double().T @ beta
        if isinstance(self.method, RECT):
            relative = (change / (matrix(module) + 1e-8)).abs().flatten()
            kept = torch.zeros_like(relative)
            kept[relative.topk(max(1, round(self.method.keep * len(relative)))).indices] = 1
            change = change * kept.view_as(change)
        if i == len(self.layers) - 1:
            self.added += change
        matrix(module).add_(change.to(self.lm.dtype))

    def _beta(self, i: int, k: Tensor, requests: list[Request]) -> Tensor:
        """β [F, d_in] by a dense solve."""
        fixed, l2 = self.fixed[i]
        if isinstance(self.method, ROME):
            mean = self._contexts(requests, self.down[i]).mean(1).double() if self.method.key == "mixed" else k
            u = torch.linalg.solve(fixed, mean.T).T
            assert len(k) == 1, "ROME writes one fact at a time"
            return u / (u * k).sum()
        sums = k.T @ k + self.earlier[i]
        if isinstance(self.method, AlphaEdit):
            return torch.linalg.solve(fixed @ sums + l2 * torch.eye(len(fixed), dtype=torch.float64), fixed @ k.T).T
        return torch.linalg.solve(fixed + sums, k.T).T

    def _keys(self, requests: list[Request], i: int) -> Tensor:
        """[F, d_in] at the i-th critical layer, by a whole run over all contexts."""
        contexts = self._contexts(requests, self.down[i])
        bare = contexts[:, 0]
        if isinstance(self.method, ROME):
            return bare if self.method.key == "mixed" else contexts.mean(1)
        return bare if contexts.shape[1] == 1 else (bare + contexts[:, 1:].mean(1)) / 2

    def _contexts(self, requests: list[Request], path: str) -> Tensor:
        texts = [text for one in requests for text in one.contexts]
        return self._run(texts, path, inputs=True).unflatten(0, (len(requests), -1))

    def _reached(self, requests: list[Request], k: Tensor) -> Tensor:
        """What stands where the value is to stand [F, d]: W k in ROME, else the state behind the last critical layer, by a whole run."""
        if isinstance(self.method, ROME):
            with torch.no_grad():
                return submodule(self.lm.model, self.down[-1])(k)
        return self._run([one.contexts[0] for one in requests], self.site, inputs=False)

    @torch.no_grad()
    def _run(self, texts: list[Encoded], path: str, inputs: bool) -> Tensor:
        """Input or output of a module at the subject's last token [B, w], from a run of the whole model over the prompts."""
        batch = self.lm.batch([replace(text, ids=text.prompt_ids) for text in texts])
        with capture(self.lm.model, {"it": path}, inputs=inputs) as seen:
            self.lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return seen["it"][torch.arange(len(texts)), batch.subject_last]

    def _size(self, noise: Tensor) -> float:
        """h of Algorithm 1."""
        norm = float(noise.norm())
        return norm if getattr(self.method, "statistic", None) == "norm" else norm**2

    def _outside(self, noise: Tensor) -> bool:
        """Whether an edit's noise [d] is out of the ordinary (eq. 24)."""
        method: Any = self.method
        h, reach = self._size(noise), method.eta * self.variance**0.5
        outside = h > self.mean + reach or (method.two_sided and h < self.mean - reach)
        return bool(self.started and self.count >= method.warm_up and outside)

    def _learn(self, noise: Tensor) -> None:
        """m and v take the noise in if it is ordinary (eq. 22, 23)."""
        method: Any = self.method
        h, outside = self._size(noise), self._outside(noise)
        self.count += 1
        if not self.started:  # until there is a history
            self.mean, self.started = h, h > 0
        elif not outside:
            self.mean = method.xi * self.mean + (1 - method.xi) * h
            self.variance = method.xi * self.variance + (1 - method.xi) * (h - self.mean) ** 2

    def _directions(self, noise: Tensor) -> Tensor:
        """Û [d, r] (eq. 18 to 20)."""
        method: Any = self.method
        outer = self.added @ self.added.T
        u, values, _ = torch.linalg.svd(torch.cat([outer, noise[:, None]], 1) if method.with_noise else outer)
        rank = min(int((values > max(method.floor, ZERO * values[0])).sum()), int(method.removed * len(u)))
        return u[:, :rank].to(self.lm.dtype)
