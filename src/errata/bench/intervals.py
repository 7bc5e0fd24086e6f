"""How far a mean can be trusted: bootstrap intervals over cases, deviations over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from errata.metrics.summary import KINDS, QUESTIONS

RESAMPLES = 1000

Floats = np.typing.NDArray[np.float64]


def rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Six decimals: beyond them is the order of summation."""
    return {name: None if value is None else round(value, 6) for name, value in metrics.items()}


def spread(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1) of each number that all of several rows have."""
    there = [name for name in metrics[0] if all(isinstance(one.get(name), int | float) for one in metrics)]
    columns = {name: [one[name] for one in metrics] for name in there}
    return {
        "mean": rounded({name: fmean(column) for name, column in columns.items()}),
        "deviation": rounded({name: stdev(column) for name, column in columns.items()}),
    }


def intervals(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """95 % bootstrap intervals [low, high] in per cent of the columns, their average, and exact generation, over resampled cases."""
    names = [*KINDS, *(QUESTIONS if any(r.get("questions") for r in records) else ()), "generation"]
    parts = [{**r, **(r.get("questions") or {}), "generation": (r.get("generation") or {}).get("exact")} for r in records]
    shares = [[part.get(name) for name in names] for part in parts]
    columns = resampled(shares, len(names))
    there = [i for i in range(len(names) - 1) if any(row[i] is not None for row in shares)]
    average = columns[:, there].mean(axis=1) if there else np.full(RESAMPLES, np.nan)
    return {name: limits(values) for name, values in zip([*names, "average"], [*columns.T, average], strict=True)}


def resampled(shares: Sequence[Sequence[float | None]], width: int) -> Floats:
    """Means in per cent of each column over resampled cases [RESAMPLES, width].

    shares: for each case its `width` columns, as fractions; a case that lacks a column stays out of it in every resample. The resampling
    has a seed of its own: the same cases give the same means.
    """
    if not shares:
        return np.full((RESAMPLES, width), np.nan)
    table = np.array(shares, dtype=float)  # [cases, width]
    n = len(table)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each case: [RESAMPLES, cases]
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        means: Floats = 100 * (drawn @ np.where(known, table, 0.0)) / (drawn @ known)
    return means


def limits(values: Floats) -> list[float | None]:
    """Nothing where the column has no data; resamples that happen to miss all of a rare probe's cases are passed over."""
    there = values[~np.isnan(values)]
    return [round(float(limit), 6) for limit in np.percentile(there, [2.5, 97.5])] if len(there) else [None, None]


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of n tests (Wilson 1927); 0 to 1 where there are none. Unlike the bootstrap's it is no point where all
    tests agree."""
    if n <= 0:
        return 0.0, 1.0
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
