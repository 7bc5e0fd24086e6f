"""DeltaEdit's memory against the accumulated matrix, decomposed from scratch in float64; its threshold against Algorithm 1 as printed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.methods.locate.history import DeltaHistory, Threshold, project_out

D, D_IN = 12, 20


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grown(edits: int, facts: int = 1) -> tuple[DeltaHistory, Tensor]:
    """A history and the same sum as a plain matrix."""
    history, matrix = DeltaHistory(D, D_IN), torch.zeros(D, D_IN, dtype=torch.float64)
    for edit in range(edits):
        left, right = normal(D, facts, seed=edit), normal(facts, D_IN, seed=1_000 + edit)
        history.add(left, right)
        matrix += left @ right
    return history, matrix


def projector(u: Tensor) -> Tensor:
    return u @ u.T


def strongest(matrix: Tensor, number: int) -> Tensor:
    """The first left singular vectors [d, number], by a full SVD."""
    return torch.linalg.svd(matrix)[0][:, :number]


def same_space(u: Tensor, wanted: Tensor, within: float = 1e-9) -> None:
    assert u.shape == wanted.shape
    assert torch.allclose(u.T @ u, torch.eye(u.shape[1], dtype=u.dtype), rtol=0, atol=1e-10)
    assert float((projector(u) - projector(wanted)).abs().max()) < within


@pytest.mark.parametrize(("edits", "facts"), [(1, 1), (5, 1), (7, 1), (8, 1), (20, 1), (100, 1), (3, 4), (30, 3), (2, 50)])
def test_noise_equals_that_of_the_matrix(edits: int, facts: int) -> None:
    history, matrix = grown(edits, facts)
    keys = normal(6, D_IN, seed=3)
    assert torch.allclose(history.times(keys), keys @ matrix.T, rtol=1e-11, atol=1e-11)
    assert torch.allclose(history.norm2(keys), (matrix @ keys.T).norm(dim=0) ** 2, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("edits", [3, 9, 60])
def test_what_was_asked_leaves_no_trace(edits: int) -> None:
    """Or a sequence that goes on, which was not asked all that, could not come to the same bits."""
    asked, plain = DeltaHistory(D, D_IN), DeltaHistory(D, D_IN)
    for edit in range(edits):
        left, right = normal(D, 1, seed=edit), normal(1, D_IN, seed=1_000 + edit)
        for history in (asked, plain):
            history.add(left, right)
        asked.directions(3, absolute=0.1)
        asked.directions(3, noise=normal(D, seed=5))
    one, other = asked.state_dict(), plain.state_dict()
    assert all(one[name] is other[name] is None or torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(asked.directions(3, absolute=0.1), plain.directions(3, absolute=0.1))


def test_an_empty_history_says_nothing() -> None:
    history = DeltaHistory(D, D_IN)
    assert torch.equal(history.norm2(normal(2, D_IN, seed=1)), torch.zeros(2, dtype=torch.float64))
    assert history.directions(9).shape == (D, 0) == history.directions(9, absolute=0.1).shape
    x = normal(3, D, seed=1)
    assert torch.equal(project_out(x, history.directions(9)), x)
    history.add(torch.zeros(D, 1), normal(1, D_IN, seed=2))
    assert history.directions(9).shape == (D, 0)


@pytest.mark.parametrize("cap", [0, 1, 3, 9, 12])
@pytest.mark.parametrize(("edits", "facts"), [(1, 1), (3, 1), (9, 1), (10, 1), (12, 1), (13, 1), (60, 1), (2, 4), (20, 4)])
def test_directions_equal_the_decomposition_from_scratch(cap: int, edits: int, facts: int) -> None:
    history, matrix = grown(edits, facts)
    same_space(history.directions(cap), strongest(matrix, min(cap, edits * facts, D)))


def test_directions_stay_right_when_asked_for_after_every_edit() -> None:
    """D is updated from the first time it was needed; below and beyond the cap, in both forms of the matrix."""
    history, matrix = DeltaHistory(D, D_IN), torch.zeros(D, D_IN, dtype=torch.float64)
    for edit in range(200):
        left, right = normal(D, 1 + edit % 2, seed=edit), normal(1 + edit % 2, D_IN, seed=1_000 + edit)
        history.add(left, right)
        matrix += left @ right
        same_space(history.directions(5), strongest(matrix, min(5, torch.linalg.matrix_rank(matrix))), 1e-7)
    assert torch.equal(history.directions(5), history.directions(5))


@pytest.mark.parametrize("edits", [4, 40])
def test_an_absolute_tolerance_is_one_of_eigenvalues(edits: int) -> None:
    history, matrix = grown(edits)
    eigenvalues = torch.linalg.svdvals(matrix) ** 2
    for limit in (0.0, float(eigenvalues[1] + eigenvalues[2]) / 2, float(eigenvalues[0]) + 1):
        number = int((eigenvalues > max(limit, 1e-9)).sum())
        same_space(history.directions(D, absolute=limit), strongest(matrix, number))
        same_space(history.directions(2, absolute=limit), strongest(matrix, min(2, number)))


def test_noise_appended_as_in_the_released_code() -> None:
    history, matrix = grown(6)
    noise = 50 * matrix @ normal(D_IN, seed=5)
    wanted = torch.cat([matrix @ matrix.T, noise.unsqueeze(1)], 1)
    same_space(history.directions(3, noise=noise), strongest(wanted, 3))
    assert float((projector(history.directions(3, noise=noise)) - projector(history.directions(3))).abs().max()) > 1e-3


def test_dependent_edits_add_no_direction_and_nearly_dependent_ones_an_orthonormal_one() -> None:
    history = DeltaHistory(D, D_IN)
    left = normal(D, 3, seed=1)
    history.add(left, normal(3, D_IN, seed=2))
    history.add(left @ normal(3, 2, seed=3), normal(2, D_IN, seed=4))
    assert history.rank == 3
    history.add(left[:, :1] + 1e-5 * normal(D, 1, seed=5), normal(1, D_IN, seed=6))
    u = history.directions(D)
    assert history.rank == 4 and torch.allclose(u.T @ u, torch.eye(4, dtype=u.dtype), rtol=0, atol=1e-12)
    history.add(left[:, :1] + 1e-9 * normal(D, 1, seed=7), normal(1, D_IN, seed=8))
    assert history.rank == 4


def test_one_key_edited_twice_keeps_both_alphas_out() -> None:
    """The matrix has rank 1 then, and yet neither αₑ alone is what later edits must avoid."""
    history, (left, beta) = DeltaHistory(D, D_IN), (normal(D, 2, seed=1), normal(1, D_IN, seed=2))
    history.add(left[:, :1], beta)
    history.add(left[:, 1:], 0.3 * beta)
    same_space(history.directions(9), torch.linalg.qr(left)[0])
    same_space(history.directions(9, absolute=1e-6), strongest((left[:, :1] + 0.3 * left[:, 1:]) @ beta, 1))


def test_projection_removes_the_directions_and_nothing_else() -> None:
    history, matrix = grown(5)
    x, u = normal(4, D, seed=9), history.directions(9)
    kept = project_out(x, u)
    assert float((kept @ matrix).abs().max()) < 1e-10
    assert torch.allclose(project_out(kept, u), kept, rtol=0, atol=1e-14)
    assert torch.allclose(kept, x @ (torch.eye(D, dtype=x.dtype) - projector(strongest(matrix, 5))), rtol=0, atol=1e-10)
    assert project_out(x.float(), u).dtype == torch.float32


@pytest.mark.parametrize("cap", [4, D])
def test_a_history_saved_and_loaded_goes_on_bit_for_bit(cap: int) -> None:
    straight, broken = DeltaHistory(D, D_IN), DeltaHistory(D, D_IN)
    keys = normal(3, D_IN, seed=7)
    for edit in range(60):
        left, right = normal(D, 1, seed=edit), normal(1, D_IN, seed=1_000 + edit)
        for history in (straight, broken):
            history.add(left, right)
        if edit % 3 == 0:
            assert torch.equal(straight.directions(cap), broken.directions(cap))
        state, broken = broken.state_dict(), DeltaHistory(D, D_IN)
        broken.load_state_dict(state)
        assert torch.equal(straight.norm2(keys), broken.norm2(keys)) and straight.rank == broken.rank
    before = {name: None if value is None else value.clone() for name, value in state.items()}
    straight.load_state_dict(state)
    straight.add(normal(D, 40, seed=1), normal(40, D_IN, seed=2))
    assert all(value is None or torch.equal(value, state[name]) for name, value in before.items())  # a state is a copy
    with pytest.raises(ValueError, match=r"\[12, 20\], this layer's is \[12, 21\]"):
        DeltaHistory(D, 21).load_state_dict(state)


def test_the_memory_is_that_of_the_smaller_form() -> None:
    size, width = 64, 192
    history, bytes_of = DeltaHistory(size, width), []
    for edit in range(300):
        history.add(normal(size, 1, seed=edit), normal(1, width, seed=edit))
        bytes_of.append(history.nbytes)
    assert max(bytes_of) <= 8 * (2.5 * size * width + size * size * 2)
    assert bytes_of[-1] == bytes_of[-33]


def test_what_does_not_fit_is_refused() -> None:
    history = DeltaHistory(D, D_IN)
    with pytest.raises(ValueError, match=r"left \[12, r\] and right \[r, 20\]"):
        history.add(normal(D, 2, seed=1), normal(1, D_IN, seed=1))
    with pytest.raises(ValueError, match="cap=-1"):
        history.directions(-1)


NOISE = st.lists(st.floats(0, 1e6), max_size=60)


@settings(max_examples=60, deadline=None)
@given(noise=NOISE, eta=st.sampled_from([0.0, 1.5, 3.0]))
def test_the_threshold_is_algorithm_1(noise: list[float], eta: float) -> None:
    threshold = Threshold(eta, decay=0.9, warm_up=5)
    m = v = 0.0
    for e, h in enumerate(noise):  # counted from 0: "the first 5 edits skip"
        if h > m + eta * math.sqrt(v) and e >= 5:
            projected = True
        else:
            projected = False
            m = 0.9 * m + (1 - 0.9) * h
            v = 0.9 * v + (1 - 0.9) * (h - m) ** 2
        assert threshold.triggered(h) == projected
        threshold.update(h)
        assert (threshold.mean, threshold.variance) == (m, v)


@settings(max_examples=30, deadline=None)
@given(noise=NOISE, cut=st.integers(0, 60), patience=st.sampled_from([None, 0, 3]), start=st.sampled_from(["zero", "first"]))
def test_a_threshold_saved_and_loaded_goes_on(noise: list[float], cut: int, patience: int | None, start: str) -> None:
    def make() -> Threshold:
        return Threshold(1.5, warm_up=3, statistic="norm", two_sided=True, start=start, patience=patience)  # type: ignore[arg-type]

    straight, broken = make(), make()
    for e, h in enumerate(noise):
        if e == cut:
            state, broken = broken.state_dict(), make()
            broken.load_state_dict(state)
        straight.update(h)
        broken.update(h)
    assert straight == broken


def test_released_code_compares_norms_on_both_sides_from_the_first_one() -> None:
    threshold = Threshold(2.0, warm_up=3, statistic="norm", two_sided=True, start="first")
    for h in (0.0, 16.0, 36.0, 16.0):  # norms 0 (no history yet), 4, 6, 4
        assert not threshold.triggered(h)
        threshold.update(h)
    mean, variance = 4.0, 0.0
    for norm in (6.0, 4.0):
        mean = 0.9 * mean + 0.1 * norm
        variance = 0.9 * variance + 0.1 * (norm - mean) ** 2
    assert threshold.band == pytest.approx((mean - 2 * variance**0.5, mean + 2 * variance**0.5))
    low, high = threshold.band
    assert threshold.triggered((high + 0.01) ** 2) and threshold.triggered((low - 0.01) ** 2) and not threshold.triggered(mean**2)
    one_sided = Threshold(2.0, warm_up=0, statistic="norm", start="first")
    one_sided.load_state_dict(threshold.state_dict())
    assert one_sided.triggered((high + 0.01) ** 2) and not one_sided.triggered((low - 0.01) ** 2)


@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("before", [1.0, 0.0])
def test_patience_ends_the_lock_in_and_only_that(eta: float, two_sided: bool, before: float) -> None:
    """Noise around 1 (or none) for 30 edits, then around 100 for good: soon that triggers as often as if it had always been so."""
    spread = 1 + 0.2 * normal(330, seed=11).clamp(-2, 2)
    jump = torch.cat([before * spread[:30], 100 * spread[30:]])

    def triggers(noise: Tensor, patience: int | None) -> list[bool]:
        threshold, found = Threshold(eta, two_sided=two_sided, patience=patience), []
        for h in noise.tolist():
            found.append(threshold.triggered(h))
            threshold.update(h)
        return found

    assert all(triggers(jump, None)[30:])  # as published: locked in
    guarded = triggers(jump, 8)
    assert all(guarded[30:38])  # the jump itself is out of the ordinary, for as long as patience lasts
    assert sum(guarded[130:]) <= sum(triggers(100 * spread, 8)[130:]) + 10 < 190


def test_senseless_settings_and_noise_are_refused() -> None:
    for wrong in ({"eta": -1.0}, {"eta": 1.0, "decay": 1.0}, {"eta": 1.0, "warm_up": -1}, {"eta": 1.0, "patience": -1}):
        with pytest.raises(ValueError, match="at least 0 and decay"):
            Threshold(**wrong)
    with pytest.raises(ValueError, match="'squared' or 'norm'"):
        Threshold(1.0, statistic="root")  # type: ignore[arg-type]
    for h in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="run away"):
            Threshold(1.0).triggered(h)
