"""Fine-tuning of MLP down-projections, one as a rule: FT-M on the target's tokens, FT-L on the last prompt position."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.edits.delta import DenseDelta, master_dtype
from errata.edits.edit import Edit
from errata.facts import Fact, FactError
from errata.lm.anatomy import is_conv1d
from errata.lm.asking import has_memory
from errata.lm.capture import add_from_input, add_to_output, capture, submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.lm.resume import can_resume, from_layer, states_at
from errata.lm.tokens import Encoded
from errata.methods.base import Method, Session, check_range, encode_each, refuse_broken
from errata.methods.on_keys import OnKeys
from errata.methods.together import Together, alike, train

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class FT(Method):
    """Adam on one MLP down-projection (FT-L: Zhu et al. 2020, Meng et al. 2022; FT-M: Zhang et al. 2024, as in OVERTONE §4.1).

    variant: "m": each target token is predicted behind the ones before it. "l": all target tokens are asked of the last prompt position.
    layer: whose down-projection is trained; of several layers, all together; None: the family's, else two thirds up.
    steps, lr: at most so many steps of Adam, no weight decay.
    stop: an edit whose loss falls below is finished (an objective that clips finishes by itself, METHODS "Token-level stop").
    clamp: L∞ limit of the change of every weight, None for no limit; FT-L's is 5e-4 where it is used.
    """

    paper: ClassVar[str] = "OVERTONE §4.1 (FT-M: arXiv 2401.01286); FT-L: arXiv 2012.00363"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"lr": 5e-4, "steps": 25},
        "llama-2-7b": {"layer": 21},
        "llama-3-8b": {"layer": 21},
        "llama-3.1-8b": {"layer": 21},
        "gpt-j-6b": {"layer": 21},
        "qwen2.5-7b": {"layer": 27},
        "atlas": {"layer": 4, "lr": 4e-2, "steps": 25},  # tuned on the dev cases with cross-entropy
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.01, "n_sigma": 0.5, "lam": 0.1, "reduction": "mean"},
    }

    variant: Literal["m", "l"] = "m"
    layer: int | tuple[int, ...] | None = None
    steps: int | None = None
    lr: float | None = None
    stop: float = 1e-2
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in ("m", "l"):
            raise ValueError(f"ft: variant must be 'm' (the target's tokens) or 'l' (the last prompt position), got {self.variant!r}")
        if isinstance(self.layer, tuple) and (not self.layer or len(set(self.layer)) < len(self.layer)):
            raise ValueError(f"{self.name}: layer must be one layer, or several that differ, got {self.layer!r}")
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        check_range(self.name, "stop", self.stop, 0)
        check_range(self.name, "clamp", self.clamp, 0, above=True)

    @property
    def name(self) -> str:  # type: ignore[override]  # the variant is part of the name
        """ft-m or ft-l."""
        return f"ft-{self.variant}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The trained layers, from low to high; none before `for_model` has filled them in."""
        return () if self.layer is None else (self.layer,) if isinstance(self.layer, int) else tuple(sorted(self.layer))

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        layers = len(lm.anatomy.layers)
        chosen = self.for_model(lm)
        chosen = replace(chosen, layer=2 * layers // 3 if chosen.layer is None else chosen.layer)
        for layer in chosen.layers:
            if not 0 <= layer < layers:
                raise ModelError(f"{lm.name} has layers 0 to {layers - 1}, not {layer}; choose one of these for {self.name}")
        refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[layer]}.weight" for layer in chosen.layers])
        return _Tuning(lm, chosen, objective, seed)

    def many(
        self, lm: LanguageModel, requests: Sequence[Sequence[Fact]], seeds: Sequence[int], objective: Objective | None = None
    ) -> list[Edit | FactError]:
        """See `Method.many`. Nothing is drawn here, so the seeds say nothing."""
        session = self.start(lm, objective)
        assert isinstance(session, _Tuning)
        if len(requests) < 2 or len(session.method.layers) > 1 or not can_resume(lm) or has_memory(lm):  # which reads whole texts
            return super().many(lm, requests, seeds, objective)
        return session.many(requests)


class _Tuning(Session):
    method: FT

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        lm, ft = self.lm, self.method
        assert ft.layers and ft.steps is not None and ft.lr is not None  # for_model filled them in
        encoded = [self.encode(fact) for fact in facts]
        batch = lm.batch(encoded)
        if ft.variant == "l":  # every target token is asked of the position before the first one
            batch = replace(batch, positions=torch.where(batch.mask, batch.positions[:, :1], batch.positions))
        paths = [lm.anatomy.mlp_down[layer] for layer in ft.layers]
        modules = {path: submodule(lm.model, path) for path in paths}
        # Only these projections change: everything below the lowest one's layer, and its input, is the same at every step.
        states = states_at(lm, batch, ft.layers[0])
        changes = {path: self._zero(module) for path, module in modules.items()}
        adam = torch.optim.Adam(changes.values(), lr=ft.lr)
        losses: list[float] = []
        reference = None
        with from_layer(lm, ft.layers[0], states) as whole, capture(lm.model, {path: path for path in paths}, inputs=True) as seen:
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = lm.target_logits(batch)
            with ExitStack() as stack:
                for path, module in modules.items():
                    stack.enter_context(add_to_output(module, partial(_written, seen, path, changes[path])))
                for step in range(ft.steps + 1):
                    if self.watch:
                        self.watch(step, whole())
                    value = self.objective.evaluate(lm.target_logits(batch), batch.targets, batch.mask, reference)
                    losses.append(value.loss.mean().item())
                    refuse_broken(lm, losses)
                    if step == ft.steps or losses[-1] < ft.stop or bool(value.finished.all()):
                        break
                    gradients = torch.autograd.grad(value.loss.mean(), list(changes.values()))
                    for change, gradient in zip(changes.values(), gradients, strict=True):
                        change.grad = gradient
                    adam.step()
                    if ft.clamp is not None:
                        for change in changes.values():
                            change.data.clamp_(-ft.clamp, ft.clamp)
        return self._made(facts, [change.detach() for change in changes.values()], losses, time.perf_counter() - clock)

    def many(self, requests: Sequence[Sequence[Fact]]) -> list[Edit | FactError]:
        """Independent edits, side by side; see `Method.many`."""
        ft = self.method
        assert ft.steps is not None and ft.lr is not None  # for_model filled them in
        texts, there, made = encode_each(self, requests)
        for group in alike(texts):
            clock = time.perf_counter()
            trained = train(_Changes(self.lm, ft, [texts[i] for i in group]), self.objective, ft.lr, ft.steps, ft.stop)
            seconds = (time.perf_counter() - clock) / len(group)
            for i, one in zip(group, trained, strict=True):
                made[there[i]] = self._made(list(requests[there[i]]), one.parameters, one.losses, seconds)
        return [made[number] for number in range(len(requests))]

    def _made(self, facts: list[Fact], changes: Sequence[Tensor], losses: list[float], seconds: float) -> Edit:
        """changes: [d, d_in] of each trained layer."""
        paths = [self.lm.anatomy.mlp_down[layer] for layer in self.method.layers]
        deltas = [
            DenseDelta(path, change.T.contiguous() if is_conv1d(submodule(self.lm.model, path)) else change)
            for path, change in zip(paths, changes, strict=True)
        ]
        diagnostics = {"steps": len(losses) - 1, "losses": losses, "seconds": seconds}
        return Edit(self.lm, deltas, facts, self.method.to_dict(), self.record(), diagnostics)

    def _zero(self, module: nn.Module) -> Tensor:
        """A change [d, d_in] of the module's weight, to be trained, wherever that weight lies."""
        weight: Tensor = module.weight  # type: ignore[assignment]  # a projection has one
        shape = (self.lm.anatomy.hidden_size, self.lm.anatomy.key_size)
        return torch.zeros(shape, dtype=master_dtype(weight), device=weight.device, requires_grad=True)


def _written(seen: Mapping[str, Tensor], path: str, change: Tensor, _: Tensor) -> Tensor:
    """Δ k, for the keys [B, T, d_in] that have just gone into the module."""
    return seen[path].to(change.dtype) @ change.T


class _Changes(Together):
    """E changes [d, d_in] of one down-projection. Its keys are the same at every step.

    Where the MLP writes straight into the residual stream, what a change makes of the keys arrives at the layer above as it is, so the
    layer itself is run once, too.
    """

    def __init__(self, lm: LanguageModel, ft: FT, texts: Sequence[Sequence[Encoded]]) -> None:
        (layer,) = ft.layers
        path = lm.anatomy.mlp_down[layer]
        self.module, self.clamp, self.last_prompt_position = submodule(lm.model, path), ft.clamp, ft.variant == "l"
        self.straight = lm.anatomy.writes_straight and layer + 1 < len(lm.anatomy.layers)
        # Where every target token is asked of the position before the first one, no later one runs.
        cut = [replace(text, ids=text.ids[: text.prompt_length + 1]) for own in texts for text in own]
        with capture(lm.model, {"k": path}, inputs=True) as seen:
            super().__init__(lm, texts, layer + self.straight, cut if self.last_prompt_position else None)
        self.changes: list[OnKeys] = self._begun(seen["k"]) if self.straight else []

    def _begun(self, keys: Tensor) -> list[OnKeys]:
        """keys: [B, T, d_in], flattened in OPT."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]  # a projection has one
        keys = keys.detach().reshape(len(self.suffix), -1, keys.shape[-1]).to(master_dtype(weight))
        return [OnKeys(own, self.lm.anatomy.hidden_size) for own in keys.chunk(self.owners.count)]  # of as many facts each

    def logits(self) -> Tensor:
        if self.straight:
            states = self.suffix.states
            logits = self.suffix.logits(states + self._made().to(states))
        else:
            with add_from_input(self.module, self._made):
                logits = self.suffix.logits(self.suffix.states)
        return logits.expand(*self.mask.shape, -1) if self.last_prompt_position else logits

    def _made(self, keys: Tensor | None = None) -> Tensor:
        """What the changes make of their keys [B, T, d]. keys: they are taken where the changes do not know theirs yet."""
        if keys is not None and not self.changes:
            self.changes = self._begun(keys)
        self.leaves = [torch.cat([change.made() for change in self.changes]).requires_grad_()]
        return self.leaves[0]

    def step(self, gradients: Sequence[Tensor], edits: Sequence[int], lr: float) -> None:
        (felt,) = gradients
        own = felt.chunk(len(self.changes))
        for edit in edits:
            self.changes[edit].step(own[edit], lr)
            if self.clamp is not None:
                self.changes[edit].value.clamp_(-self.clamp, self.clamp)

    def parameters_of(self, edit: int) -> list[Tensor]:
        return [self.changes[edit].value]

    def keep(self, edits: list[int]) -> Tensor:
        rows = super().keep(edits)
        self.changes = [self.changes[edit] for edit in edits]
        for change in self.changes:
            change.cut(self.suffix.states.shape[1])
        return rows
