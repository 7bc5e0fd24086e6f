"""PRUNE's restraint on singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from errata.methods.locate.spectrum import restrain

D, D_IN = 7, 11
FORMULAS = {
    "log": lambda x, s: math.log(x) - math.log(s) + s,
    "linear": lambda x, s: x / 2 + s / 2,
    "log2": lambda x, s: math.log2(x) - math.log2(s) + s,
    "log1.5": lambda x, s: math.log(x, 1.5) - math.log(s, 1.5) + s,
    "log1.2": lambda x, s: math.log(x, 1.2) - math.log(s, 1.2) + s,
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: list[float], seed: int) -> Tensor:
    left, _, right = torch.linalg.svd(normal(D, D_IN, seed=seed), full_matrices=False)
    return (left * torch.tensor(values, dtype=torch.float64)) @ right


ORIGINAL = with_singular_values([6.0, 5, 4, 3, 2, 1, 0.5], 1)
CHANGE = with_singular_values([600.0, 60, 6.1, 5.9, 2, 1, 0], 2)


@pytest.mark.parametrize("variant", FORMULAS)
def test_large_singular_values_obey_the_formula_and_the_others_stay(variant: str) -> None:
    found = restrain(ORIGINAL, CHANGE, variant)
    wanted = [FORMULAS[variant](x, 6.0) for x in (600.0, 60.0, 6.1)] + [5.9, 2, 1, 0]
    assert torch.allclose(torch.linalg.svdvals(found), torch.tensor(wanted, dtype=torch.float64).sort(descending=True)[0], atol=1e-10)
    # the singular vectors are those of the change
    left, _, right = torch.linalg.svd(CHANGE, full_matrices=False)
    assert torch.allclose(left.T @ found @ right.T, torch.diag(torch.tensor(wanted, dtype=torch.float64)), atol=1e-10)


@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0])
def test_a_small_change_comes_back_as_it_was(size: float) -> None:
    change = with_singular_values([6 * size] * 7, 3) * (1 - 1e-9)
    assert torch.equal(restrain(ORIGINAL, change), change)
    assert restrain(ORIGINAL, change) is not change
    assert torch.equal(restrain(ORIGINAL.float(), (0.1 * change).float()), (0.1 * change).float().double())


@pytest.mark.parametrize("variant", ["log", "linear"])
def test_rotating_both_sides_rotates_the_result(variant: str) -> None:
    a, b = torch.linalg.qr(normal(D, D, seed=4))[0], torch.linalg.qr(normal(D_IN, D_IN, seed=5))[0]
    rotated = restrain(a @ ORIGINAL @ b, a @ CHANGE @ b, variant)
    assert torch.allclose(rotated, a @ restrain(ORIGINAL, CHANGE, variant) @ b, atol=1e-10)


def test_what_makes_no_sense_is_refused() -> None:
    for variant in ("log1", "log0.5", "logs", "cubic", "loginf", ""):
        with pytest.raises(ValueError, match="unknown restraint"):
            restrain(ORIGINAL, CHANGE, variant)
    with pytest.raises(ValueError, match="shape of the matrix"):
        restrain(ORIGINAL, CHANGE.T)
    with pytest.raises(ValueError, match="variant='linear'"):
        restrain(torch.zeros_like(CHANGE), CHANGE)
    assert torch.allclose(restrain(torch.zeros_like(CHANGE), CHANGE, "linear"), CHANGE / 2)
