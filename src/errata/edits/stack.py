"""The edits that are active on a model, and the arithmetic that keeps apply and revert exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from errata.edits.delta import Delta, LowRankDelta, Replacement, master_dtype
from errata.edits.errors import EditError
from errata.edits.memory import Memory
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import submodule
from errata.lm.loading import refuse_uneditable

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel


BLOCK = 64
"""Ranks of low-rank deltas that follow one another are added in blocks of about so many: one product of matrices in the place of many thin
ones, which makes thousands of edits quick to take up and quick to take out of."""


@dataclass(slots=True)
class _Kept:
    """original: the untouched weight, bit for bit. closed: the sum up to the last whole block, never written to; None: the original.

    open: the low-rank deltas behind it, whose ranks do not make a block yet.
    """

    original: Tensor
    closed: Tensor | None = None
    open: list[LowRankDelta] = field(default_factory=list)

    def folded(self, path: str) -> list[Delta]:
        """The same in one delta or two, with the same block open behind it, so that what follows comes to the same bits."""
        whole: list[Delta] = [] if self.closed is None else [Replacement(path, self.closed)]
        return [*whole, self.block(path)] if self.open else whole

    def block(self, path: str) -> LowRankDelta:
        """The open block as one delta."""
        left = torch.cat([delta.left.to(self.master) for delta in self.open], 1)
        return LowRankDelta(path, left, torch.cat([delta.right.to(self.master) for delta in self.open], 0))

    @property
    def master(self) -> Tensor:
        """Of the dtype and on the device in which is summed; no values."""
        return self.original.new_empty(0, dtype=master_dtype(self.original))


class Stack:
    """The active edits of one model, in the order in which they were applied.

    A touched weight always holds  cast((W₀ + Δ₁) + Δ₂ + …)  over the active deltas in that order, low-rank ones by blocks (`BLOCK`), summed
    in float32 (float64 for float64 weights) and cast once. So the weights depend on the active edits alone, not on what was applied and
    reverted in between; applying costs one product of a block, reverting a sum over the active deltas of the same matrices. Only touched
    matrices are kept, and only as long as an edit touches them. A long sequence is folded from time to time, so that it needs no more
    memory than one edit.

    Of edits that keep a memory beside the weights, that of the last one is attached; it holds those before it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._kept: dict[str, _Kept] = {}
        self._folded: WeakSet[Edit] = WeakSet()  # known as long as somebody asks for them; their deltas are in the base edit
        self._aside = False
        self._attached: tuple[Memory, ExitStack] | None = None
        self.active: list[Edit] = []

    @classmethod
    def of(cls, lm: LanguageModel) -> Stack:
        """The stack of this model, made at first use. It hangs on the model itself: two LanguageModels around it share it."""
        stack: Stack = vars(lm.model).setdefault("errata_edits", cls(lm))
        return stack

    @property
    def touched(self) -> list[str]:
        """Paths of the modules whose weights active edits have changed, in alphabetical order."""
        return sorted(self._kept)

    @property
    def memory(self) -> Memory | None:
        """The memory that the active edits come to."""
        return next((edit.memory for edit in reversed(self.active) if edit.memory is not None), None)

    def holds(self, edit: Edit) -> bool:
        """Whether this very edit is active, by itself or folded into the base edit."""
        return edit in self._folded or any(edit is other for other in self.active)

    @torch.no_grad()
    def apply(self, *edits: Edit) -> None:
        """Add the edits' deltas to the weights, in their order, after those of the active edits.

        Raises EditError if one is active already or does not fit, ModelError if a weight cannot be written to; then nothing changed.
        """
        self._refuse_aside()
        memory = self.memory
        for i, edit in enumerate(edits):
            if self.holds(edit) or any(edit is other for other in edits[:i]):
                raise EditError(f"{edit} is applied already; revert() it first")
            self._check(edit)
            if edit.memory is not None:
                if memory is not None and edit.memory.parent != memory.id:
                    raise EditError(
                        f"{edit} has a memory that does not go on from the one that is attached; a model has one memory at a time: "
                        "apply the edits of a session in their order, or revert the others first (a memory holds all earlier edits of "
                        "its session)"
                    )
                memory = edit.memory
        paths = list(dict.fromkeys(path for edit in edits for path in _paths(edit)))
        with ExitStack() as undo:  # also when interrupted: all of them or nothing
            undo.callback(self._rebuild, paths)
            if memory is not self.memory:
                undo.callback(self._attach, self.memory)
                self._attach(memory)
            for path in paths:
                self._kept.setdefault(path, _Kept(self._weight(path).clone()))
                self._add(path, edits)
            self.active.extend(edits)
            undo.pop_all()

    @torch.no_grad()
    def revert(self, edit: Edit) -> None:
        """Take the edit away; the weights are then those of the other active edits alone, bit for bit.

        Raises EditError if it is not active, or cannot be told from the edits it was folded with.
        """
        self._refuse_aside()
        if not self.holds(edit):
            raise EditError(f"{edit} is not applied; apply() it first")
        if edit in self._folded:
            raise EditError(f"{edit} was folded with others into {self.active[0]}; revert() that one, which takes all of them out")
        if edit.memory is not None and edit.memory is not self.memory:
            raise EditError(f"later edits hold what {edit} keeps in their memories; revert the edits of its session from the last one back")
        if self._folded and edit is self.active[0]:
            self._folded.clear()
        self.active = [other for other in self.active if other is not edit]
        self._attach(self.memory)
        self._rebuild(_paths(edit))

    @torch.no_grad()
    def fold(self) -> Edit:
        """Make the active edits one: a base edit that replaces each touched weight by their sum. The weights stay as they are, and what is
        applied later comes to the same bits.

        The folded edits still count as applied, but only the base edit can be reverted, and all of them with it.
        Memory is that of one edit again, as soon as nobody else keeps the folded ones.
        """
        from errata.edits.edit import Edit

        self._refuse_aside()
        # The fingerprint of an edit's own model was taken before any edit; `self._lm` may not have been asked for its one yet.
        lm = self.active[0].lm if self.active else self._lm
        deltas = [delta for path in self.touched for delta in self._kept[path].folded(path)]
        base = Edit(lm, deltas, [fact for edit in self.active for fact in edit.facts], {"name": "folded"}, memory=self.memory)
        for edit in self.active:
            self._folded.add(edit)
        self.active = [base]
        return base

    @torch.no_grad()
    def clear(self) -> None:
        """Take every edit out in one step: the originals, bit for bit."""
        self._refuse_aside()
        self._attach(None)
        for path, kept in self._kept.items():
            self._weight(path).copy_(kept.original)
        self._kept.clear()
        self._folded.clear()
        self.active = []

    @contextmanager
    def aside_(self) -> Iterator[None]:
        """The unedited model while it lasts, then the edited one again, bit for bit. Edits stay as they are: none may come or go."""
        self._refuse_aside()
        self._attach(None)
        self._aside = True
        try:
            with torch.no_grad():
                for path, kept in self._kept.items():
                    self._weight(path).copy_(kept.original)
            yield
        finally:
            with torch.no_grad():
                for path in self._kept:
                    self._weight(path).copy_(self._sum(path))
            self._aside = False
            self._attach(self.memory)

    @contextmanager
    def without_(self, edits: Sequence[Edit]) -> Iterator[None]:
        """The model without those of the edits that are applied while it lasts, then with all again, bit for bit; none may come or go.

        Raises EditError for one that was folded with others.
        """
        self._refuse_aside()
        if folded := [edit for edit in edits if edit in self._folded]:
            raise EditError(f"{folded[0]} was folded with others into {self.active[0]}, and cannot be taken out by itself any more")
        active, out = self.active, set(map(id, edits))
        paths = list(dict.fromkeys(path for edit in active if id(edit) in out for path in _paths(edit)))
        try:
            self._bring([edit for edit in active if id(edit) not in out], paths)
            self._aside = True
            yield
        finally:
            self._aside = False
            self._bring(active, paths)

    @torch.no_grad()
    def _bring(self, active: list[Edit], paths: Iterable[str]) -> None:
        """Let these be the active edits, which differ from those of now in what touches these paths."""
        self.active = active
        self._attach(self.memory)
        for path in paths:
            self._kept.setdefault(path, _Kept(self._weight(path).clone()))
        self._rebuild(paths)

    @contextmanager
    def detached_(self) -> Iterator[None]:
        """The weights as they are, without the memory, while it lasts. Edits stay as they are: none may come or go."""
        if self._aside:  # then it is detached already
            yield
            return
        self._attach(None)
        self._aside = True
        try:
            yield
        finally:
            self._aside = False
            self._attach(self.memory)

    def change(self, path: str) -> tuple[Tensor, Tensor]:
        """W₀ and W − W₀ of a module's weight, as stored, the second before any cast. Raises EditError if no active edit touches it."""
        if path not in self._kept:
            raise EditError(f"no applied edit touches {path!r}; there are {', '.join(self.touched) or 'none'}")
        now = self._sum(path)
        return self._kept[path].original, now - self._kept[path].original.to(now)

    def _attach(self, memory: Memory | None) -> None:
        """Let this memory answer, in the place of the one that does now."""
        if self._attached is not None:
            if self._attached[0] is memory:
                return
            self._attached[1].close()
            self._attached = None
        if memory is not None:
            _ = self._lm.anatomy  # is tried out at first use, and must be the model's own
            with ExitStack() as stack:
                stack.enter_context(memory.attached(self._lm))
                self._attached = (memory, stack.pop_all())

    def _refuse_aside(self) -> None:
        if self._aside:
            raise EditError("edits are set aside for the moment; leave `aside_()` or `without_()` before one is applied or reverted")

    def _check(self, edit: Edit) -> None:
        refuse_uneditable(self._lm, [f"{path}.weight" for path in _paths(edit)])
        for delta in edit.deltas:
            wanted = delta.stored_shape(self._transposed(delta.path))
            if wanted != (found := tuple(self._weight(delta.path).shape)):
                stored = "[in, out]" if self._transposed(delta.path) else "[out, in]"
                raise EditError(
                    f"the {delta.kind} delta for {delta.path!r} fits a weight of {list(wanted)}; "
                    f"that module's is {list(found)}, stored as {stored}"
                )

    def _rebuild(self, paths: Iterable[str]) -> None:
        """From the original and the active edits; forgets matrices that no edit touches any more."""
        for path in paths:
            if path not in self._kept:
                continue
            kept = self._kept[path] = _Kept(self._kept[path].original)
            touching = [edit for edit in self.active if path in _paths(edit)]
            if touching:
                self._add(path, touching)
            else:
                self._weight(path).copy_(kept.original)
                del self._kept[path]

    def _add(self, path: str, edits: Iterable[Edit]) -> None:
        kept, transposed = self._kept[path], self._transposed(path)
        for delta in (delta for edit in edits for delta in edit.deltas if delta.path == path):
            if isinstance(delta, LowRankDelta):
                kept.open.append(delta)
                if sum(part.rank for part in kept.open) < BLOCK:
                    continue
                closed = self._sum(path)
            else:
                closed = self._sum(path)
                delta.add_(closed, transposed)
            kept.closed, kept.open = closed, []
        self._weight(path).copy_(self._sum(path))

    def _sum(self, path: str) -> Tensor:
        """The weight before it is cast, as a tensor of its own."""
        kept = self._kept[path]
        total = kept.original if kept.closed is None else kept.closed
        total = total.to(master_dtype(kept.original), copy=True)
        if kept.open:
            kept.block(path).add_(total, self._transposed(path))
        return total

    def _weight(self, path: str) -> Tensor:
        weight: nn.Parameter = self._module(path).weight  # type: ignore[assignment]  # refuse_uneditable has seen it
        return weight.detach()

    def _transposed(self, path: str) -> bool:
        return is_conv1d(self._module(path))

    def _module(self, path: str) -> nn.Module:
        return submodule(self._lm.model, path)


def _paths(edit: Edit) -> list[str]:
    """The touched modules, each once, in order."""
    return list(dict.fromkeys(delta.path for delta in edit.deltas))
