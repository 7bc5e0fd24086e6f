"""Benchmarks: a plan is run into a folder of records, and the results are read from the records alone.

The folder holds `plan.yaml` (the effective configuration), `records.jsonl` (one line a case, on the disk before the next case
begins) and `results.json`. `errata.bench.run.run` does it; it needs torch, and the names here do not.
"""

from __future__ import annotations

from errata.bench.plan import Plan, PlanError

__all__ = ["Plan", "PlanError"]
