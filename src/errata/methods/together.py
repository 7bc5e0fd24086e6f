"""Many independent edits optimised side by side: shared frozen weights, and for each edit its own parameters, optimiser state and stop.

The facts of all edits are rows of one batch, and every row runs with the parameters of its own edit, so no gradient of one edit reaches
another: each becomes what it would become alone, up to rounding. An edit that is finished leaves, with its rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.own import Owners
from errata.lm.suffix import Suffix
from errata.lm.tokens import Encoded
from errata.methods.base import refuse_broken

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

LONGER = 1.3
"""Edits run together when the longest text is at most so many times as long as the shortest: little is padded, and few groups arise."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One edit: its parameters, without the edit dimension, and its losses before each update and after the last."""

    parameters: list[Tensor]
    losses: list[float]


class Together(ABC):
    """E edits in optimisation. B rows: the facts of all of them, those of one edit side by side.

    texts: the encoded facts of each edit. layer: the layers from here on run. targets, mask [B, Tm]: as in Batch.
    leaves: what gradients are asked for; as the last call of `logits` left it.
    """

    leaves: list[Tensor]

    def __init__(self, lm: LanguageModel, texts: Sequence[Sequence[Encoded]], layer: int, cut: Sequence[Encoded] | None = None) -> None:
        """cut: the texts that run where they are not those of the facts."""
        rows = [text for own in texts for text in own]
        batch = lm.batch(rows)
        self.lm = lm
        self.owners = Owners([e for e, own in enumerate(texts) for _ in own], len(texts), lm.device)
        self.targets, self.mask = batch.targets, batch.mask
        self.suffix = Suffix(lm, cut or rows, layer, starts=[0] * len(rows), cached=False)

    @abstractmethod
    def logits(self) -> Tensor:
        """Logits at the targets [B, Tm, V] with the edits as they are, differentiable in the leaves."""

    @abstractmethod
    def step(self, gradients: Sequence[Tensor], edits: Sequence[int], lr: float) -> None:
        """One update of Adam with the gradients of the leaves. Of other edits than these nothing is asked any more."""

    @abstractmethod
    def parameters_of(self, edit: int) -> list[Tensor]:
        """What an edit has come to: its parameters, without the edit dimension, which no later step changes."""

    def keep(self, edits: list[int]) -> Tensor:
        """Go on with these edits alone. Returns the rows [K] that are left."""
        self.owners, rows = self.owners.keep(edits)
        self.suffix = self.suffix.keep(rows)
        wide = max(1, int(self.mask[rows].sum(1).max()))
        self.targets, self.mask = self.targets[rows, :wide], self.mask[rows, :wide]
        return rows


class Stacked(Together):
    """Edits of a few numbers each, which are stacked: leaves [E, ..]; row e belongs to the e-th edit that has not left."""

    _adam: torch.optim.Adam | None = None

    def step(self, gradients: Sequence[Tensor], edits: Sequence[int], lr: float) -> None:
        """See `Together.step`: every number is treated by itself, so it hurts nobody that all are."""
        if self._adam is None:
            self._adam = torch.optim.Adam(self.leaves, fused=True)
        self._adam.param_groups[0]["lr"] = lr
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient.contiguous()  # fused Adam takes it as it lies in memory
        self._adam.step()

    def parameters_of(self, edit: int) -> list[Tensor]:
        """See `Together.parameters_of`."""
        return [leaf.detach()[edit].clone() for leaf in self.leaves]

    def keep(self, edits: list[int]) -> Tensor:
        """See `Together.keep`."""
        left = [leaf.detach()[edits].requires_grad_() for leaf in self.leaves]
        if self._adam is not None:
            for old, new in zip(self.leaves, left, strict=True):
                moments = self._adam.state.pop(old)
                self._adam.state[new] = {name: value if name == "step" else value[edits] for name, value in moments.items()}
            self._adam.param_groups[0]["params"] = left
        self.leaves = left
        return super().keep(edits)


def train(
    edits: Together, objective: Objective, lr: float, steps: int, stop: float | None = None, halve_every: int | None = None
) -> list[Trained]:
    """Adam on each edit's parameters, minimising the mean of the objective over its facts, at most `steps` updates.

    stop: an edit whose loss falls below it is finished. One none of whose tokens is active is finished in any case.
    halve_every: so many updates halve the rate.
    Raises EditError where already the first loss is no number, ValueError if the objective does not fit.
    """
    count = edits.owners.count
    losses: list[list[float]] = [[] for _ in range(count)]
    final: dict[int, list[Tensor]] = {}
    active = list(range(count))
    reference: Tensor | None = None
    with frozen(edits.lm):
        for step in range(steps + 1):
            logits = edits.logits()
            if step == 0 and objective.needs_reference:
                reference = logits.detach()  # nothing is changed yet
            value = objective.evaluate(logits, edits.targets, edits.mask, reference)
            loss = edits.owners.means(value.loss)  # [A]
            finished = edits.owners.every(value.finished).tolist()
            for place, (edit, now) in enumerate(zip(active, loss.tolist(), strict=True)):
                losses[edit].append(now)
                refuse_broken(edits.lm, losses[edit])
                if step == steps or finished[place] or (stop is not None and now < stop):
                    finished[place] = True
                    final[edit] = edits.parameters_of(place)
            going = [place for place, done in enumerate(finished) if not done]
            if not going:
                break
            gradients = torch.autograd.grad(loss[going].sum(), edits.leaves)
            edits.step(gradients, going, lr * 0.5 ** (step // halve_every) if halve_every else lr)
            if len(going) < len(active):
                active = [active[place] for place in going]
                rows = edits.keep(going)
                reference = None if reference is None else reference[rows, : edits.mask.shape[1]]
    return [Trained(final[edit], losses[edit]) for edit in range(count)]


def alike(texts: Sequence[Sequence[Encoded]]) -> list[list[int]]:
    """Numbers of edits that run together without much padding, in groups: as many facts each, of about one length."""

    def shape(edit: int) -> tuple[int, int]:
        return len(texts[edit]), max(len(text.ids) for text in texts[edit])

    groups: list[list[int]] = []
    for edit in sorted(range(len(texts)), key=shape):
        if groups and shape(groups[-1][0])[0] == shape(edit)[0] and shape(edit)[1] <= LONGER * shape(groups[-1][0])[1]:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


@contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """No weight of the model asks for a gradient while it lasts, so nothing is kept for one."""
    asking = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
