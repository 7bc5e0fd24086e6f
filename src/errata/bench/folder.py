"""The run folder: who may write into it, and lines that are on the disk or not there at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from errata.bench.plan import Plan, PlanError, Row
from errata.disk import replacing

PLAN, RECORDS, RESULTS, STATE = "plan.yaml", "records.jsonl", "results.json", "state"

Record = dict[str, Any]
Key = tuple[str, int, str]


def key_of(row: Row, what: str) -> Key:
    """What a record is found by: the row's name, its seed, and the case, or the step of a sequence ("edit 7", "checkpoint 100")."""
    return row.name, row.seed, what


def said_of(record: Record) -> str:
    """The case or the step that a record is of."""
    found: str = record["step"] if "step" in record else record["case"]
    return found


def claim(plan: Plan, out: Path, resume: bool) -> Plan:
    """Whether `plan` may be run into `out`, before anything heavy is loaded; the plan with what the folder already knows.

    A resumed run takes over threads, hash, fingerprint and versions of the run that began, to be compared once they are known.

    Raises PlanError if the folder holds a run and `resume` is False, holds something else, or was started with another plan.
    """
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out} is a file; --out must be a folder")
    if not (out / PLAN).exists():
        # Killed before the plan was whole, a run begins again.
        if out.exists() and any(not fnmatch(path.name, f".{PLAN}.*.tmp") for path in out.iterdir()):
            raise PlanError(f"{out} is not empty and holds no {PLAN}; give another --out")
        return plan
    if not resume:
        raise PlanError(f"{out} holds a run already; go on with --resume, or give another --out")
    begun = Plan.read(out / PLAN)
    known = replace(
        plan,
        threads=plan.threads or begun.threads,
        batch=plan.batch or begun.batch,
        dtype=plan.dtype or begun.dtype,
        split=plan.split or begun.split,
        data_hash=begun.data_hash,
        model_fingerprint=begun.model_fingerprint,
        versions=begun.versions,
    )
    known.must_equal(begun, str(out))
    return known


def start(plan: Plan, out: Path) -> None:
    """Write `plan.yaml`, or compare with the one that is there. Raises PlanError if they differ."""
    if (out / PLAN).exists():
        plan.must_equal(Plan.read(out / PLAN), str(out))
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / PLAN, plan.dump())


def read_records(path: Path) -> dict[Key, Record]:
    """The records of a run by their key; a torn last line (the process was killed while writing) is cut off the file.

    Raises PlanError for a broken line anywhere else: that is damage, and not for us to repair.
    """
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]  # a line is complete with its line break, which is written last
    if len(whole) < len(raw):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    records: dict[Key, Record] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[f"{record['method']}+{record['objective']}", record["seed"], said_of(record)] = record
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{path}, line {number} is damaged ({error!r}); remove the line and resume: it is measured again") from error
    return records


def append(path: Path, record: Mapping[str, Any]) -> Record:
    """Write one line and wait until it is on the disk. Returns the record as a reader will see it."""
    line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    with open(path, "ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    read: Record = json.loads(line)
    return read


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a resumed run, sees the old text or the new one, never half."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON-ready: NaN and infinity become null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
