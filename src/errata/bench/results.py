"""From records to results. Nothing enters `results.json` that does not stand in a record, the plan or the environment, so a run
that was stopped and went on ends where an undisturbed one ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from errata.bench.folder import Key, Record, key_of
from errata.bench.plan import Plan, Row
from errata.metrics.summary import KINDS
from errata.metrics.summary import summarise as means

PACKAGES = ("errata", "torch", "transformers", "peft", "tokenizers", "numpy")
RESAMPLES = 1000


def summarise(
    plan: Plan, case_ids: Mapping[int, Sequence[str]], records: Mapping[Key, Record], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `results.json`: rows in the plan's order, each over its seed's cases in the data's order (not the file's)."""
    keys = {row: [key_of(row, case) for case in case_ids[row.seed]] for row in plan.rows}
    rows = [_row(plan, row, [records[key] for key in keys[row] if key in records]) for row in plan.rows]
    over = {"over_seeds": over_seeds(rows)} if len(plan.seeds) > 1 else {}
    return {"rows": rows, **over, "environment": dict(environment)}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Method × objective: mean and standard deviation (n - 1) over the seeds of each metric that every seed has, and of the seconds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["objective"]), []).append(row)
    made = []
    for (method, objective), same in groups.items():
        there = [name for name in same[0]["metrics"] if all(row["metrics"].get(name) is not None for row in same)]
        values = {name: [row["metrics"][name] for row in same] for name in there}
        seconds = [row["seconds_per_edit"] for row in same if row["seconds_per_edit"] is not None]
        made.append(
            {
                "method": method,
                "objective": objective,
                "seeds": [row["seed"] for row in same],
                "n": sum(row["n"] for row in same),
                "mean": rounded({name: fmean(column) for name, column in values.items()}),
                "deviation": rounded({name: stdev(column) for name, column in values.items()}),
                "seconds_per_edit": fmean(seconds) if seconds else None,
            }
        )
    return made


def _row(plan: Plan, row: Row, records: Sequence[Record]) -> dict[str, Any]:
    measured = [record for record in records if "error" not in record]
    return {
        "method": row.method,
        "objective": row.objective,
        "protocol": plan.protocol,
        "n": len(measured),
        "failed": len(records) - len(measured),
        "seed": row.seed,
        "metrics": rounded(means(measured)),
        "intervals": intervals(measured),
        "seconds_per_edit": fmean(record["seconds"]["edit"] for record in measured) if measured else None,
        "peak_memory_mb": max((record["peak_memory_mb"] for record in measured), default=None),
        "settings": measured[0]["settings"] if measured else {},
    }


def rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Six decimals: beyond them is the order of summation."""
    return {name: None if value is None else round(value, 6) for name, value in metrics.items()}


def intervals(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """95 % bootstrap intervals [low, high] in per cent of the columns, their average, and exact generation, over resampled cases.

    A case that lacks a column stays out of it in every resample. The resampling has a seed of its own: the same cases give the same
    interval.
    """
    names = [*KINDS, "generation"]
    if not records:
        return {name: [None, None] for name in [*names, "average"]}
    shares = np.array([[*(r.get(kind) for kind in KINDS), (r.get("generation") or {}).get("exact")] for r in records], dtype=float)
    n = len(records)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each case: [resamples, n]
    known = ~np.isnan(shares)  # [n, columns]
    with np.errstate(invalid="ignore"):
        columns = 100 * (drawn @ np.where(known, shares, 0.0)) / (drawn @ known)  # [resamples, columns]
    there = [column for column in range(len(KINDS)) if known[:, column].any()]
    average = columns[:, there].mean(axis=1) if there else np.full(RESAMPLES, np.nan)
    return {name: _limits(values) for name, values in zip([*names, "average"], [*columns.T, average], strict=True)}


def _limits(values: np.typing.NDArray[np.float64]) -> list[float | None]:
    """Nothing where the column has no data; resamples that happen to miss all of a rare probe's cases are passed over."""
    there = values[~np.isnan(values)]
    return [round(float(limit), 6) for limit in np.percentile(there, [2.5, 97.5])] if len(there) else [None, None]


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
