"""PRUNE's restraint (arXiv 2405.16821, §4.2): what a whole sequence of edits added may hardly stretch more than the matrix itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def restrain(original: Tensor, change: Tensor, variant: str = "log") -> Tensor:
    """The change W_T − W₀ [d, d_in] with its large singular values restrained, in float64; to be added to W₀, not to the edited matrix.

    With s = σ_max(original), a singular value σ > s of the change becomes, by `variant`,
        "log"      ln σ − ln s + s                      (the paper's)
        "log2" …   the same with that base: any "log<base>" with a base above 1, such as "log1.5", "log1.2"
        "linear"   ½σ + ½s
    and the others stay. All leave s where it is. The logarithms grow by 1/(s·ln base) per unit there: they restrain where s·ln base > 1,
    as in the papers' models, and would *stretch* small excesses of a matrix with a smaller σ_max; "linear" is free of scale.

    Raises ValueError if the shapes differ or there is no such variant.
    """
    if original.shape != change.shape or change.dim() != 2:
        raise ValueError(f"the change must have the shape of the matrix it is added to: {list(change.shape)} for {list(original.shape)}")
    base = growth_base(variant)
    change = change.double()
    limit = float(torch.linalg.matrix_norm(original.double(), ord=2))
    if float(change.norm()) <= limit:  # no singular value is larger than the Frobenius norm: nothing to decompose
        return change.clone()
    left, sigma, right = torch.linalg.svd(change, full_matrices=False)
    large = sigma > limit
    if base is not None and limit == 0 and bool(large.any()):
        raise ValueError("the original matrix is zero: a logarithm cannot restrain a change to it; use variant='linear'")
    sigma, left, right = sigma[large], left[:, large], right[large]
    restrained = (sigma + limit) / 2 if base is None else (sigma / limit).log() / math.log(base) + limit
    return torch.addmm(change, left * (restrained - sigma), right)


def growth_base(variant: str) -> float | None:
    """The logarithm's base; None for "linear". Raises ValueError for an unknown variant."""
    if variant == "linear":
        return None
    if variant == "log":
        return math.e
    try:
        base = float(variant.removeprefix("log")) if variant.startswith("log") else 0.0
    except ValueError:
        base = 0.0
    if not 1 < base < math.inf:
        raise ValueError(f"unknown restraint {variant!r}; choose 'log', 'linear', or 'log' with a base above 1, such as 'log2'")
    return base
