"""Is one method better than another? Both measured on the same cases, so that the cases' own difficulty drops out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from statistics import fmean
from typing import NamedTuple, TypeVar

from errata.bench.intervals import limits, resampled

FEWEST = 10
"""Cases below which nothing is settled, whatever they say."""

K = TypeVar("K", bound=Hashable)


class Paired(NamedTuple):
    """n: cases that both have. difference: mean of one's value minus the other's, in points of a hundred. low, high: its 95 % bootstrap
    interval over the cases. sure: the share of resamples in which the one is ahead, ties counting half; 0.5 says nothing at all."""

    n: int
    difference: float
    low: float
    high: float
    sure: float

    @property
    def enough(self) -> bool:
        """Whether there are cases enough for an interval that resamples them to mean anything."""
        return self.n >= FEWEST

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero, of cases enough."""
        return self.enough and (self.low > 0 or self.high < 0)


def paired(one: Mapping[K, float], other: Mapping[K, float]) -> Paired | None:
    """Compare values by case, as fractions; None where they have no case in common."""
    both = sorted((case for case in one if case in other), key=repr)  # the same cases are drawn whoever stands first
    if not both:
        return None
    differences = [one[case] - other[case] for case in both]
    means = resampled([[value] for value in differences], 1)[:, 0]
    low, high = limits(means)
    assert low is not None and high is not None  # no difference is missing
    sure = float(((means > 0) + 0.5 * (means == 0)).mean())
    return Paired(len(both), round(100 * fmean(differences), 6), low, high, round(sure, 4))
