"""Null spaces against U Uᵀ, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.statistics import NullSpace, StatisticsError, collect, null_space_for, spectrum
from tests.families import SENTENCES, language_model


def moment(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, in directions drawn at random."""
    random = torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(random).Q
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


def projector(moment: Tensor, dimensions: int) -> Tensor:
    """U Uᵀ from the singular vectors, as AlphaEdit's own code does it."""
    u = torch.linalg.svd(moment).U[:, len(moment) - dimensions :]
    return u @ u.T


VALUES = [10.0, 5.0, 2.0, 1.0, 0.5, 0.01, 0.003, 0.001, 1e-5, 0.0]


@pytest.mark.parametrize(("threshold", "dimensions", "complement"), [(0.002, 3, False), (2e-2, 5, False), (0.7, 6, True), (20.0, 10, True)])
def test_both_forms_are_u_ut(threshold: float, dimensions: int, complement: bool) -> None:
    c = moment(VALUES)
    space = NullSpace.of(c, threshold)
    wanted = projector(c, dimensions)
    assert (space.dimensions, space.width, space.complement, space.threshold) == (dimensions, 10, complement, threshold)
    assert space.share == dimensions / 10 and space.basis.shape == (10, min(dimensions, 10 - dimensions))
    x = torch.randn(2, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(space.project(x), x @ wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(space.project(x[0, 0]), wanted @ x[0, 0], rtol=1e-10, atol=1e-10)
    assert space.energy == pytest.approx((wanted @ c).trace().item(), abs=1e-10)
    by_share = NullSpace.of(c, share=dimensions / 10)
    torch.testing.assert_close(by_share.project(x), space.project(x), rtol=1e-10, atol=1e-10)
    assert by_share.threshold is None and by_share.dimensions == dimensions


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 12), rank=st.integers(1, 12), share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_a_projector_is_idempotent_and_symmetric(width: int, rank: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rank, width, dtype=torch.float64, generator=generator)
    c = keys.T @ keys / rank
    if round(share * width) == 0:
        with pytest.raises(StatisticsError, match="empty"):
            NullSpace.of(c, share=share)
        return
    space = NullSpace.of(c, share=share)
    p = space.project(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-10)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-10)
    assert p.trace().item() == pytest.approx(space.dimensions, abs=1e-9) and space.basis.shape[1] <= width / 2
    assert space.energy == pytest.approx(space.project(keys).square().sum().item() / rank, abs=1e-9), "what keys have inside the space"


def test_what_is_refused() -> None:
    c = moment(VALUES)
    with pytest.raises(
        StatisticsError, match=r"empty: no eigenvalue .* below the threshold -1, .* raise the threshold, or ask for a share"
    ):
        NullSpace.of(c, -1.0)
    with pytest.raises(StatisticsError, match="give one of them"):
        NullSpace.of(c)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(StatisticsError, match="above 0 and at most 1"):
            NullSpace.of(c, share=share)
    with pytest.raises(StatisticsError, match="square"):
        NullSpace.of(c[:3], 1.0)
    with pytest.raises(StatisticsError, match="not finite"):
        NullSpace.of(c * torch.inf, 1.0)
    assert NullSpace.of(c, 1.5, share=0.1).dimensions == 7, "a threshold comes before a share"


def test_it_takes_the_type_of_what_it_projects() -> None:
    space = NullSpace.of(moment(VALUES), share=0.6)
    x = torch.randn(3, 10)
    assert space.basis.dtype == torch.float64 and space.project(x).dtype == torch.float32
    half = space.to("cpu", torch.float32)
    assert half.basis.dtype == torch.float32 and half.dimensions == space.dimensions and half.complement == space.complement
    torch.testing.assert_close(half.project(x), space.project(x.double()).float())


def test_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    moments = collect(lm, SENTENCES, [0, 1], tokens=500)
    space = null_space_for(lm, moments, 1, share=0.5)
    torch.testing.assert_close(spectrum(moments.mean(1))[:20].sum().item(), space.energy, rtol=1e-9, atol=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("decomposed again"))
        assert null_space_for(lm, moments, 1, share=0.5) is space
    assert null_space_for(lm, moments, 0, share=0.5) is not space and null_space_for(lm, moments, 1, share=0.6).dimensions == 24
    with pytest.raises(StatisticsError, match="of the model 'llama'"):
        null_space_for(language_model("llama", seed=1), moments, 1, share=0.5)
