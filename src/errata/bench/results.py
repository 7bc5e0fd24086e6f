"""From records to results. Nothing enters `results.json` that does not stand in a record, the plan or the environment, so a run
that was stopped and went on ends where an undisturbed one ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from errata.bench.folder import Key, Record, key_of
from errata.bench.intervals import intervals, rounded, spread
from errata.bench.plan import Plan, Row
from errata.bench.trajectory import over_marks, sequence_row
from errata.metrics.summary import summarise as means

PACKAGES = ("errata", "torch", "transformers", "peft", "tokenizers", "numpy")


def summarise(
    plan: Plan, case_ids: Mapping[int, Sequence[str]], records: Mapping[Key, Record], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `results.json`: rows in the plan's order, each over its seed's cases in the order in which they were drawn."""
    if plan.sequence is None:
        keys = {row: [key_of(row, case) for case in case_ids[row.seed]] for row in plan.rows}
        rows = [_row(plan, row, [records[key] for key in keys[row] if key in records]) for row in plan.rows]
    else:
        rows = [sequence_row(plan, row, case_ids[row.seed], records) for row in plan.rows]
    over = {"over_seeds": over_seeds(rows)} if len(plan.seeds) > 1 else {}
    return {"rows": rows, **over, "environment": dict(environment)}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Method × objective: mean and standard deviation (n - 1) over the seeds of each metric that every seed has, and of the seconds.

    Those of sequences have a list "checkpoints" beside it, with the same for each.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["objective"]), []).append(row)
    made = []
    for (method, objective), same in groups.items():
        over = spread([row["metrics"] for row in same])
        marks = {"checkpoints": over_marks(same)} if "checkpoints" in same[0]["metrics"] else {}
        seconds = [row["seconds_per_edit"] for row in same if row["seconds_per_edit"] is not None]
        made.append(
            {
                "method": method,
                "objective": objective,
                "seeds": [row["seed"] for row in same],
                "n": sum(row["n"] for row in same),
                **over,
                **marks,
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
        **({"curves": averaged(measured)} if plan.curves else {}),
    }


def averaged(records: Sequence[Record]) -> dict[str, Any] | None:
    """The curves of these records as one (see `errata.metrics.overfitting.average`); None where the editor has no steps."""
    from errata.metrics.overfitting import Curves, average  # with torch, which not every reader of results needs

    return average([Curves.from_dict(record["curves"]) for record in records if record.get("curves")])


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
