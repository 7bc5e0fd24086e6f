"""TIES: several changes of one matrix made one, without one undoing the other (Yadav et al., arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """One change for K: trim, elect a sign, and average those that agree; all of one shape and dtype.

    Trim: of each change the `density` largest entries by size stay, ties broken by place, counted over all entries: of one that only a
    share ρ ≤ density may move nothing goes. Elect: the sign of Σ_k w_k τ_k. Average: Σ w_k τ_k / Σ w_k over the k with that sign.
    """
    total, agreed = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    trimmed = [_trim(change, density) for change in changes]
    for weight, change in zip(weights, trimmed, strict=True):
        total += weight * change
    sign = total.sign()
    total.zero_()
    for weight, change in zip(weights, trimmed, strict=True):
        agrees = (change.sign() == sign) & (change != 0)
        total += torch.where(agrees, weight * change, 0.0)
        agreed += agrees * weight
    return total / agreed.masked_fill(agreed == 0, 1.0)


def _trim(change: Tensor, density: float) -> Tensor:
    keep = int(density * change.numel())
    if int(change.count_nonzero()) <= keep:
        return change
    kept = change.flatten().abs().sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(change).flatten().index_put((kept,), change.flatten()[kept]).view_as(change)
