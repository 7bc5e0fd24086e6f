"""The edits that are active on a model, and the arithmetic that keeps apply and revert exact."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from errata.edits.delta import master_dtype
from errata.edits.errors import EditError
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import submodule
from errata.lm.loading import refuse_uneditable

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel


@dataclass(slots=True)
class _Kept:
    """original: the untouched weight, bit for bit. master: the running sum, None where the weight is wide enough to be it itself."""

    original: Tensor
    master: Tensor | None


class Stack:
    """The active edits of one model, in the order in which they were applied.

    A touched weight always holds  cast(((W₀ + Δ₁) + Δ₂) + …)  over the active deltas in that order, summed in float32 (float64 for
    float64 weights) and cast once. So the weights depend on the active edits alone, not on what was applied and reverted in between;
    applying costs one addition, reverting a sum over the active deltas of the same matrices. Only touched matrices are kept, and only
    as long as an edit touches them.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._kept: dict[str, _Kept] = {}
        self.active: list[Edit] = []

    @classmethod
    def of(cls, lm: LanguageModel) -> Stack:
        """The stack of this model, made at first use. It hangs on the model itself: two LanguageModels around it share it."""
        stack: Stack = vars(lm.model).setdefault("errata_edits", cls(lm))
        return stack

    def holds(self, edit: Edit) -> bool:
        """Whether this very edit is active."""
        return any(edit is other for other in self.active)

    @torch.no_grad()
    def apply(self, edit: Edit) -> None:
        """Add the edit's deltas to the weights, after those of the active edits.

        Raises EditError if it is active already or does not fit, ModelError if a weight cannot be written to; then nothing changed.
        """
        if self.holds(edit):
            raise EditError(f"{edit} is applied already; revert() it first")
        paths = self._checked(edit)
        with ExitStack() as undo:  # also when interrupted: all of the edit or nothing of it
            undo.callback(self._rebuild, paths)
            for path in paths:
                if path not in self._kept:
                    weight = self._weight(path)
                    wide = weight.dtype == master_dtype(weight)
                    self._kept[path] = _Kept(weight.clone(), None if wide else weight.to(master_dtype(weight)))
                self._add(path, [edit])
            self.active.append(edit)
            undo.pop_all()

    @torch.no_grad()
    def revert(self, edit: Edit) -> None:
        """Take the edit away; the weights are then those of the other active edits alone, bit for bit.

        Raises EditError if it is not active.
        """
        if not self.holds(edit):
            raise EditError(f"{edit} is not applied; apply() it first")
        self.active = [other for other in self.active if other is not edit]
        self._rebuild(_paths(edit))

    def _checked(self, edit: Edit) -> list[str]:
        paths = _paths(edit)
        refuse_uneditable(self._lm, [f"{path}.weight" for path in paths])
        for delta in edit.deltas:
            wanted = delta.stored_shape(self._transposed(delta.path))
            if wanted != (found := tuple(self._weight(delta.path).shape)):
                stored = "[in, out]" if self._transposed(delta.path) else "[out, in]"
                raise EditError(
                    f"the {delta.kind} delta for {delta.path!r} fits a weight of {list(wanted)}; "
                    f"that module's is {list(found)}, stored as {stored}"
                )
        return paths

    def _rebuild(self, paths: Iterable[str]) -> None:
        """From the original and the active edits; forgets matrices that no edit touches any more."""
        for path in paths:
            if path not in self._kept:
                continue
            kept = self._kept[path]
            self._weight(path).copy_(kept.original)
            touching = [edit for edit in self.active if path in _paths(edit)]
            if not touching:
                del self._kept[path]
                continue
            if kept.master is not None:
                kept.master.copy_(kept.original)
            self._add(path, touching)

    def _add(self, path: str, edits: Iterable[Edit]) -> None:
        weight, master, transposed = self._weight(path), self._kept[path].master, self._transposed(path)
        for edit in edits:
            for delta in edit.deltas:
                if delta.path == path:
                    delta.add_(weight if master is None else master, transposed)
        if master is not None:
            weight.copy_(master)

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
