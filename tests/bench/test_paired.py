"""Paired comparison: the cases' own difficulty drops out, and the sign turns with the order."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.bench.paired import paired

VALUES = st.dictionaries(st.integers(0, 30), st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1)


@given(VALUES, VALUES)
def test_the_difference_on_the_cases_that_both_have(one: dict[int, float], other: dict[int, float]) -> None:
    found, turned = paired(one, other), paired(other, one)
    both = sorted(set(one) & set(other))
    if not both:
        assert found is None
        return
    assert found is not None and turned is not None
    assert found.n == len(both)
    assert found.difference == pytest.approx(100 * fmean(one[case] - other[case] for case in both), abs=1e-5)
    assert found.low - 1e-5 <= found.difference <= found.high + 1e-5
    assert turned.difference == pytest.approx(-found.difference) and turned.clear == found.clear
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-5)
    assert found.sure + turned.sure == pytest.approx(1, abs=2e-4)


def test_what_is_settled_and_what_is_not() -> None:
    """Ten points ahead on every case, although cases differ by sixty: paired that is beyond doubt."""
    hard = {case: 0.1 + 0.6 * (case % 2) for case in range(40)}
    ahead = paired({case: value + 0.1 for case, value in hard.items()}, hard)
    assert ahead is not None and ahead.clear and ahead.sure == 1 and ahead.difference == pytest.approx(10)
    same = paired(hard, hard)
    assert same is not None and not same.clear and same.sure == 0.5 and (same.low, same.high) == (0, 0)
    few = paired({case: 1.0 for case in range(9)}, {case: 0.0 for case in range(9)})
    assert few is not None and not few.clear and not few.enough
