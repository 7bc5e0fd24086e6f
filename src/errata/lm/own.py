"""Rows of one batch, each with a change of its own: E changes of a weight side by side, and which row goes with which.

    W x + Δ_e(b) x_b      instead of      (W + Δ_e) x,   edit after edit

so that the frozen W is read once for all of them. A row is one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Within = Callable[[list[int]], AbstractContextManager[object]]
"""(numbers of what the rows of a batch are about, row by row): what is to be entered while the model runs them."""


def within_of(within: Within | None, numbers: Sequence[int]) -> AbstractContextManager[object]:
    """`within`, or nothing where there is none."""
    return nullcontext() if within is None else within(list(numbers))


def mapped(within: Within | None, numbers: Sequence[int]) -> Within | None:
    """The same for texts of which number i is about numbers[i]."""
    return None if within is None else lambda rows: within([numbers[row] for row in rows])


class Owners:
    """Which of E changes each of B rows runs with.

    index [B] long. texts [E]: rows of each change.
    """

    def __init__(self, rows: Sequence[int], count: int, device: torch.device | str | None = None) -> None:
        """rows: B numbers from 0 to count - 1. Raises ValueError for others."""
        if rows and not (min(rows) >= 0 and max(rows) < count):
            raise ValueError(f"rows must name one of {count} changes, got {min(rows)} to {max(rows)}")
        self.rows = tuple(rows)
        self.count = count
        self.index = torch.tensor(self.rows, dtype=torch.long, device=device)
        self.texts = torch.bincount(self.index, minlength=count)
        each = len(rows) // max(count, 1)
        self.even = self.rows == tuple(i for i in range(count) for _ in range(each))  # E groups of as many rows, in order
        self.places = [] if self.even else [(e, (self.index == e).nonzero().squeeze(-1)) for e in sorted(set(rows))]
        self.back = torch.cat([rows for _, rows in self.places]).argsort() if self.places else self.index  # rows by change -> as they are

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, changes: Sequence[int]) -> tuple[Owners, Tensor]:
        """For these changes alone, numbered anew, and the rows [K] that are left."""
        new = {old: i for i, old in enumerate(changes)}
        left = [row for row, owner in enumerate(self.rows) if owner in new]
        kept = Owners([new[self.rows[row]] for row in left], len(changes), self.index.device)
        return kept, torch.tensor(left, dtype=torch.long, device=self.index.device)

    def means(self, values: Tensor) -> Tensor:
        """[B] -> [E]: the mean over the rows of each change."""
        if self.even:
            return values.view(self.count, -1).mean(1)
        return values.new_zeros(self.count).index_add(0, self.index, values) / self.texts

    def every(self, flags: Tensor) -> Tensor:
        """[B] bool -> [E] bool: all rows of the change."""
        missing = torch.zeros(self.count, dtype=torch.long, device=flags.device).index_add(0, self.index, (~flags).long())
        return missing == 0

    def low_rank(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """L_e R_e x: x [B, T, in], left [E, out, r], right [E, r, in] -> [B, T, out]."""
        if not (self.even and len(self) == self.count):
            left, right = left[self.index], right[self.index]
        return torch.bmm(torch.bmm(x, right.transpose(1, 2)), left.transpose(1, 2))

    def dense(self, x: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """Δ_e x: x [B, T, in], changes E × [out, in] -> [B, T, out]. No change is copied for each of its rows."""
        if self.even:
            return torch.cat([rows @ change.T for rows, change in zip(x.chunk(self.count), changes, strict=True)])
        return torch.cat([x[rows] @ changes[e].T for e, rows in self.places])[self.back]
