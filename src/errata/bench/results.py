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
        rows = [_row(plan, row, case_ids[row.seed], records) for row in plan.rows]
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


def _row(plan: Plan, row: Row, case_ids: Sequence[str], lines: Mapping[Key, Record]) -> dict[str, Any]:
    """n: the cases that were measured; failed: the cases whose edit could not be made. In continual editing one whose edit broke down is
    measured too, as the model without it answers."""
    records = [lines[key] for case in case_ids if (key := key_of(row, case)) in lines]
    measured = [record for record in records if "reliability" in record]
    made = [record for record in records if "error" not in record]
    several = {} if plan.block is None else _blocks(plan.measure, plan.block, len(case_ids))
    after_each = [seen for record in records if "reliability" in (seen := record.get("after_each", {}))]
    return {
        "method": row.method,
        "objective": row.objective,
        "protocol": plan.protocol,
        **several,
        "n": len(measured),
        "failed": len(records) - len(made),
        "seed": row.seed,
        "metrics": {**rounded(means(measured)), **({"after_each": rounded(means(after_each))} if after_each else {})},
        "intervals": intervals(measured),
        "seconds_per_edit": fmean(record["seconds"]["edit"] for record in made) if made else None,
        "peak_memory_mb": max((record["peak_memory_mb"] for record in made), default=None),
        "settings": made[0]["settings"] if made else {},
        **({"curves": averaged(measured)} if plan.curves else {}),
    }


def _blocks(measure: str, size: int, cases: int) -> dict[str, Any]:
    """When the cases were measured, in how many blocks they were edited, and how many the last one had."""
    return {"measure": measure, "blocks": -(-cases // size), "last_block": (cases - 1) % size + 1 if cases else 0}


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
