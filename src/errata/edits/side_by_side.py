"""Several edits of one model at the same time, each for rows of its own: no weight is written, every row is given its edit's change.

What they are for is measuring single edits in batches: row b of a batch runs with W + Δ_e(b). In float32 that is what one applied edit
after another gives, up to rounding. In half precision it is not: there an applied edit is cast with the weight that it is added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.edits.codebook import Books, CodeBook
from errata.edits.delta import DenseDelta, LowRankDelta, master_dtype
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.lm.anatomy import is_conv1d
from errata.lm.asking import has_memory
from errata.lm.capture import add_from_input, submodule
from errata.lm.own import Owners

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


class SideBySide:
    """E edits that are not applied, ready to be run side by side.

    Raises EditError for one that keeps another memory than a code book beside the weights, or replaces a weight: only what is added can be
    added row by row. It also does for a code book that does not fit.
    """

    def __init__(self, lm: LanguageModel, edits: Sequence[Edit]) -> None:
        if refused := [edit for edit in edits if not can_stand_beside(edit)]:
            raise EditError(f"{refused[0]} does more than add to weights, so it cannot run beside others; apply() it by itself")
        self._lm, self._count = lm, len(edits)
        paths = dict.fromkeys(delta.path for edit in edits for delta in edit.deltas)
        self._changes = {path: _Change(lm, path, edits) for path in paths}
        memories = [edit.memory if isinstance(edit.memory, CodeBook) else None for edit in edits]
        forms = dict.fromkeys(book.form for book in memories if book is not None)
        self._books = [Books(lm, [book if book is not None and book.form == form else None for book in memories]) for form in forms]

    @contextmanager
    def rows(self, edits: Sequence[int]) -> Iterator[None]:
        """While it lasts, row b of each batch that runs (of so many rows) is that of the model with edit number edits[b] applied.

        Raises ValueError for a number that no edit has, EditError where an edit has a code book and the model a memory already.
        """
        if self._books and has_memory(self._lm):
            raise EditError(f"{self._lm.name} has a memory beside its weights, and can have one at a time; revert() what keeps it first")
        owners = {self._lm.device: Owners(edits, self._count, self._lm.device)}
        with ExitStack() as stack:
            for path, change in self._changes.items():
                if change.device not in owners:
                    owners[change.device] = Owners(edits, self._count, change.device)
                stack.enter_context(add_from_input(submodule(self._lm.model, path), partial(change, owners[change.device])))
            for books in self._books:
                stack.enter_context(books.attached(edits))
            yield


def can_stand_beside(edit: Edit) -> bool:
    """Whether an edit does nothing but add to weights, or to what they make of the questions in its code book."""
    additive = all(isinstance(delta, DenseDelta | LowRankDelta) for delta in edit.deltas)
    return additive and (edit.memory is None or isinstance(edit.memory, CodeBook))


def lowest(lm: LanguageModel, edits: Sequence[Edit]) -> tuple[int, bool] | None:
    """The lowest layer that one of the edits changes, and whether it is the down-projection of its MLP alone that is changed there.

    None where they change something outside of the layers, or nothing, or keep a memory, which has to read every question.
    """
    if any(edit.memory is not None for edit in edits):
        return None
    paths = {delta.path for edit in edits for delta in edit.deltas}
    layers = {path: n for path in paths for n, layer in enumerate(lm.anatomy.layers) if path.startswith(f"{layer}.")}
    if not paths or layers.keys() < paths:
        return None
    layer = min(layers.values())
    return layer, all(n > layer or path == lm.anatomy.mlp_down[layer] for path, n in layers.items())


class _Change:
    """What E edits add to one module: dense, E × [out, in]; low, left [E, out, r] and right [E, r, in]. None where no edit has any."""

    def __init__(self, lm: LanguageModel, path: str, edits: Sequence[Edit]) -> None:
        module = submodule(lm.model, path)
        weight: Tensor = module.weight  # type: ignore[assignment]  # deltas are made for modules that have one
        transposed = is_conv1d(module)
        out, width = weight.shape[::-1] if transposed else weight.shape
        self.device = weight.device
        like = weight.new_zeros((), dtype=master_dtype(weight))
        dense, left, right = [], [], []
        for edit in edits:
            own = [delta for delta in edit.deltas if delta.path == path]
            full = [delta.tensor.to(like) for delta in own if isinstance(delta, DenseDelta)]
            low = [(delta.left.to(like), delta.right.to(like)) for delta in own if isinstance(delta, LowRankDelta)]
            summed = (full[0] if len(full) == 1 else torch.stack(full).sum(0)) if full else None
            dense.append(summed.T if summed is not None and transposed else summed)
            left.append(torch.cat([like.new_zeros(out, 0), *(pair[0] for pair in low)], 1))
            right.append(torch.cat([like.new_zeros(0, width), *(pair[1] for pair in low)]))
        nothing = like.expand(out, width)
        self.dense = None if all(change is None for change in dense) else [nothing if change is None else change for change in dense]
        rank = max(pair.shape[1] for pair in left)
        self.low = None
        if rank:  # the shorter ones are filled up with zeros
            filled = [torch.nn.functional.pad(pair, (0, rank - pair.shape[1])) for pair in left]
            self.low = torch.stack(filled), torch.stack([torch.nn.functional.pad(pair, (0, 0, 0, rank - len(pair))) for pair in right])
        self.dtype = like.dtype

    def __call__(self, owners: Owners, x: Tensor) -> Tensor:
        """x [B, T, in], or flattened -> [B, T, out]."""
        x = x.reshape(len(owners), -1, x.shape[-1]).to(self.dtype)
        if self.low is None:
            return owners.dense(x, self.dense or ())
        made = owners.low_rank(x, *self.low)
        return made if self.dense is None else made + owners.dense(x, self.dense)
