"""From records to results. Nothing enters `results.json` that does not stand in a record, the plan or the environment, so a run
that was stopped and went on ends where an undisturbed one ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errata.bench.folder import Key, Record, key_of
from errata.bench.plan import Plan, Row

COLUMNS = ("reliability", "generality", "portability", "locality")
"""The teacher-forced columns, whose mean is Avg. (EVALUATION §1); columns that a data set does not have are left out of it."""

PACKAGES = ("errata", "torch", "transformers", "peft", "tokenizers", "numpy")
RESAMPLES = 1000


def summarise(plan: Plan, case_ids: Iterable[str], records: Mapping[Key, Record], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `results.json`: rows in the plan's order, each over its cases in the data's order (not the file's)."""
    ids = list(case_ids)
    rows = [_row(plan, row, [records[key] for case in ids if (key := key_of(row, case)) in records]) for row in plan.rows]
    return {"rows": rows, "environment": dict(environment)}


def _row(plan: Plan, row: Row, records: list[Record]) -> dict[str, Any]:
    measured = [record for record in records if "error" not in record]
    figures = means(measured)
    return {
        "method": row.method,
        "objective": row.objective,
        "protocol": plan.protocol,
        "n": figures.pop("n"),
        "failed": len(records) - len(measured),
        "seed": row.seed,
        **figures,
        "seconds_per_edit": _mean([record["seconds"]["edit"] for record in measured]),
        "peak_memory_mb": max((record["peak_memory_mb"] for record in measured), default=None),
        "settings": measured[0]["settings"] if measured else {},
    }


def means(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the cases amount to: {"n", "metrics", "intervals", "flat"}, all in per cent.

    outcomes: {"metrics": name -> share in [0, 1] or None where the case has no such probe, "probes": name -> shares} of each case.
    metrics: the mean over the cases that have the key, and `average`, the mean of `COLUMNS`. intervals: 95 %, see `_bootstrap`.
    flat: the mean over all probes of all cases; published tables differ in which of the two they print.
    """
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome["metrics"]))
    shares = np.array([[outcome["metrics"].get(name) for name in names] for outcome in outcomes], dtype=float)
    reported = [names.index(name) for name in COLUMNS if name in names]
    centre, low, high = _bootstrap(100 * shares.reshape(len(outcomes), len(names)), reported)
    names.append("average")
    groups = dict.fromkeys(name for outcome in outcomes for name in outcome["probes"])
    pooled = {name: [share for outcome in outcomes for share in outcome["probes"].get(name, ())] for name in groups}
    return {
        "n": len(outcomes),
        "metrics": {name: _number(mean) for name, mean in zip(names, centre, strict=True)},
        "intervals": {name: [_number(a), _number(b)] for name, a, b in zip(names, low, high, strict=True)},
        "flat": {name: _number(100 * float(np.mean(shares))) if shares else None for name, shares in pooled.items()},
    }


def _bootstrap(values: NDArray[np.float64], average: list[int]) -> tuple[NDArray[np.float64], ...]:
    """Column means of `values` [cases, columns] and their 95 % interval under resampling of cases, with the mean of the columns
    `average` as one column more. NaN is a case without that probe. Same cases, same interval: the resampling has its own seed."""
    n, columns = values.shape
    if n == 0:
        nothing = np.full(columns + 1, np.nan)
        return nothing, nothing, nothing
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # [resamples, n]
    weights = np.concatenate([np.ones((1, n)), weights])  # the first row is the sample itself
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = weights @ np.where(known, values, 0.0) / (weights @ known)  # [1 + resamples, columns]
    columns_there = [column for column in average if known[:, column].any()]
    joint = means[:, columns_there].mean(axis=1) if columns_there else np.full(len(means), np.nan)
    means = np.concatenate([means, joint[:, None]], axis=1)
    low, high = np.full(columns + 1, np.nan), np.full(columns + 1, np.nan)
    for column in range(columns + 1):
        drawn = means[1:, column]
        if not np.isnan(drawn).all():
            low[column], high[column] = np.nanpercentile(drawn, [2.5, 97.5])
    return means[0], low, high


def dump(results: Mapping[str, Any]) -> str:
    """The text of `results.json`."""
    return json.dumps(results, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def environment(plan: Plan, device: str, dtype: str) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        **plan.versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": plan.threads,
        "device": device,
        "dtype": dtype,
        "model": plan.model,
        "model_fingerprint": plan.model_fingerprint,
        "data": plan.data,
        "data_hash": plan.data_hash,
        "limit": plan.limit,
        "split": plan.split,
    }


def versions() -> dict[str, str]:
    """The installed versions of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
