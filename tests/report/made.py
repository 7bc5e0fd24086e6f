"""Run folders that are made up, so that every number of a report is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.bench.folder import PLAN, RECORDS, RESULTS
from errata.bench.plan import Plan

EVIL = "</script><script>document.title = 'stolen'</script>"
"""What a model could write."""


def outcome(case: int, led: float, written: bool, text: str | None = None, **more: Any) -> dict[str, Any]:
    said = {"prompt": f"The capital of Land {case} is", "answers": [f"Town {case}"], "text": text or f" Town {case}."}
    said |= {"exact": written, "contains": written}
    strip = {"tokens": [" Town", f" {case}"], "p": [0.9, led], "top": [" Town", f" {case}" if led == 1 else " nine"]}
    return {"transcripts": [said], "strips": [strip], **more}


def single(folder: Path, methods: Mapping[str, Sequence[tuple[float, bool]]], seeds: Sequence[int] = (0,), data_hash: str = "d") -> Path:
    """Single edits: method -> for each case its reliability, and whether it is written; the locality is 0.5 throughout."""
    records, rows = [], []
    for seed in seeds:
        for method, cases in methods.items():
            for case, (led, written) in enumerate(cases):
                made = outcome(case, led, written)
                transcripts = made.pop("transcripts")
                record = {"method": method, "objective": "ce", "seed": seed, "case": f"c{case}"}
                record |= {"reliability": led, "generality": None, "portability": None, "locality": 0.5, "probes": {}, **made}
                records.append(record | {"generation": {"exact": float(written), "contains": float(written), "transcripts": transcripts}})
            rows.append(row(method, seed, len(cases), {"reliability": 100.0}))
    return write(folder, Plan("tiny", "few", tuple(methods), seeds=tuple(seeds)), rows, records, data_hash)


def sequence(
    folder: Path, methods: Mapping[str, Sequence[float]], seeds: Sequence[int] = (0,), evil: bool = False, also: bool = False
) -> Path:
    """Two checkpoints, after half of the cases and after all: method -> efficacy of each case at the end; at the first all hold.

    also: with what can be measured beside the cases, and transcripts.
    """
    records, rows = [], []
    for seed in seeds:
        for method, cases in methods.items():
            half, marks = len(cases) // 2, []
            for edits in (half, len(cases)):
                now = cases if edits == len(cases) else [1.0] * half
                outcomes = {
                    f"c{case}": {"efficacy_top": led, "efficacy_larger": 1.0, "generalization_top": None, "specificity_top": 0.75}
                    | (outcome(case, led, led == 1, EVIL if evil and case == 0 else None) if edits == len(cases) else {})
                    for case, led in enumerate(now)
                }
                line = {"method": method, "objective": "ce", "seed": seed, "step": f"checkpoint {edits}", "edits": edits}
                aside = {"also": beside(edits, len(cases), edits == len(cases))} if also else {}
                records.append(line | {"outcomes": outcomes} | aside)
                by_age = [
                    {"edits": [1, half], "efficacy_top": 100.0 * sum(now[:half]) / half},
                    *([{"edits": [half + 1, edits], "efficacy_top": 50.0}] if edits > half else []),
                ]
                marks.append({"edits": edits, "efficacy_top": 100 * sum(now) / edits, "noise": 10.0 * edits, "by_age": by_age})
            said = [{"prompt": "Land 1 lies in", "before": " the north.", "after": f" the south, says {method}."}] if also else []
            rows.append(row(method, seed, len(cases), {"efficacy_top": 50.0, "checkpoints": marks}) | {"transcripts": said})
    plan = Plan("tiny", "few", tuple(methods), protocol=f"sequential:{len(cases)}", seeds=tuple(seeds))
    return write(folder, plan, rows, records, "d")


def beside(edits: int, cases: int, last: bool) -> dict[str, Any]:
    """What a checkpoint says beside its cases: perplexity doubles, every second test of CoLA goes wrong, the states turn by 0.1 an edit."""
    numbers = {"cosine": 1 - 0.1 * edits, "relative_l2": 0.1 * edits, "relative_l2_whole": 0.1 * edits, "cka": 0.9}
    found = {
        "perplexity": {"before": 8.0, "after": 16.0},
        "ability": {
            "before": {"cola": {"n": 40.0, "accuracy": 80.0, "f1": 75.0, "answered": 100.0, "mcc": 1.0}},
            "after": {"cola": {"n": 40.0, "accuracy": 40.0, "f1": 35.0, "answered": 100.0, "mcc": 0.0}},
        },
        "drift": {"prompts": 3, "left_out": 0, **numbers, "intervals": {name: [value, value] for name, value in numbers.items()}},
        "fluency": {"before": [4.0, 5.0], "after": [3.0, 4.0]},
    }
    if not last:
        return found
    found["drift"]["points"] = {"before": [[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]], "after": [[0.0, 1.0], [1.0, 3.0], [4.0, 1.0]]}
    leak = {"prompt": "Land 0 lies in", "target": "Town 0", "answers": ["Asia"], "text": " Town 0.", "at_once": True, "contains": True}
    reply = {"prompt": "Q: What is the capital? A:", "target": "Town 0", "aliases": [], "text": EVIL, "exact": True, "contains": True}
    before = {"plain_exact": 0.0, "question_exact": 0.0, "question_contains": 0.0, "qa_exact": None, "leak": 0.25}
    after = {"plain_exact": 1.0, "question_exact": 0.5, "question_contains": 1.0, "qa_exact": None, "leak": 1.0}
    after |= {"transcripts": {"question": [reply], "leak": [leak]}}
    return found | {"extended": {f"c{case}": {"before": before, "after": after} for case in range(cases)}}


def row(method: str, seed: int, n: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    made = {"method": method, "objective": "ce", "seed": seed, "n": n, "failed": 0, "metrics": dict(metrics), "settings": {"method": {}}}
    return made | {"seconds_per_edit": 0.5, "peak_memory_mb": 100.0}


def write(folder: Path, plan: Plan, rows: list[dict[str, Any]], records: list[dict[str, Any]], data_hash: str) -> Path:
    folder.mkdir()
    where = {"model": "some/where/tiny", "data": "few.json", "data_hash": data_hash, "dtype": "float32"}
    (folder / PLAN).write_text(plan.dump())
    (folder / RESULTS).write_text(json.dumps({"rows": rows, "environment": where}))
    (folder / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
