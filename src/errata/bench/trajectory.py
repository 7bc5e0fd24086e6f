"""From the lines of a sequence to its row of `results.json`: how well the edits hold, checkpoint by checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from errata.bench.folder import Key, Record, key_of
from errata.bench.intervals import limits, resampled, rounded, spread
from errata.bench.plan import Plan, Row
from errata.metrics.ability import difference
from errata.metrics.generation import summarise_extended
from errata.metrics.probability import COLUMNS, summarise

WHENS = ("before", "after")
STAGE = "seconds_"
"""How diagnostics name the time of a stage: seconds_value, seconds_write …"""


def sequence_row(plan: Plan, row: Row, case_ids: Sequence[str], records: Mapping[Key, Record]) -> dict[str, Any]:
    """What a row of a sequence says, from its lines alone.

    metrics: those of the last checkpoint, and all of them under "checkpoints", each with `edits`, `noise_by_layer`, `k_beta_by_layer` and
        `by_age`: the means over blocks of cases, as the checkpoints divide the sequence. `noise` and `k_beta` are those of the last edited
        layer; what was measured beside the cases stands under `also`. With measure "both" the means right after each case's own edit
        stand under "after_each".
    diagnostics: means of what the method had to say about its edits (DeltaEdit: the share of `constrained` ones). finish_error: why what
        the method does at the end of a sequence could not be done; there are no metrics then.
    n, failed: cases measured at the end, cases whose edit failed; not_finite: of these, edits that would have broken the weights, whose
        cases are in every mean, as the model without them answers. seconds: for one case.
    """
    edits = [records[key] for edits in range(1, len(case_ids) + 1) if (key := key_of(row, f"edit {edits}")) in records]
    marks = [records[key] for mark in plan.marks if (key := key_of(row, f"checkpoint {mark}")) in records]
    right_after = {case: outcome for line in edits for case, outcome in line.get("outcomes", {}).items()}
    checkpoints = [_checkpoint(plan, case_ids, line, right_after) for line in marks]
    last = marks[-1] if marks else {}
    measured = list(_outcomes(plan, last, right_after, case_ids).values())
    made = [line for line in edits if "error" not in line]
    failed = [line for line in edits if "error" in line]
    return {
        "method": row.method,
        "objective": row.objective,
        "protocol": plan.protocol,
        "measure": plan.measure,
        "batch": plan.batch,
        "n": len(measured),
        "failed": sum(len(line["cases"]) for line in failed),
        "not_finite": sum(len(line["cases"]) for line in failed if line["failure"] == "not finite"),
        "seed": row.seed,
        "metrics": {**(_scalars(checkpoints[-1]) if checkpoints else _means([])), "checkpoints": checkpoints},
        "intervals": dict(zip(COLUMNS, map(limits, resampled([[o[m] for m in COLUMNS] for o in measured], len(COLUMNS)).T), strict=True)),
        "seconds_per_edit": _per_case(made, [line["seconds"]["edit"] for line in made]),
        "seconds_by_stage": _stages(made),
        "diagnostics": _means_of([line["diagnostics"] for line in made]),
        "finish_error": last.get("finish_error"),
        "peak_memory_mb": max((line["peak_memory_mb"] for line in made), default=None),
        "settings": last.get("settings", {}),
        "weights_sha256": last.get("weights_sha256"),
        "transcripts": last.get("transcripts", []),
    }


def over_marks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the seeds' rows at each checkpoint."""
    columns = zip(*(row["metrics"]["checkpoints"] for row in rows), strict=True)
    return [{"edits": same[0]["edits"], **spread([_scalars(checkpoint) for checkpoint in same])} for same in columns]


def _checkpoint(plan: Plan, case_ids: Sequence[str], line: Record, right_after: Mapping[str, Record]) -> dict[str, Any]:
    edits = line["edits"]
    starts = [0, *(mark for mark in plan.marks if mark < edits)]
    blocks = zip(starts, [*starts[1:], edits], strict=True)
    outcomes = _outcomes(plan, line, right_after, case_ids)
    final = _last_layer(line["noise"])
    both = {"after_each": _means(right_after[case] for case in case_ids[:edits] if case in right_after)} if plan.measure == "both" else {}
    return {
        "edits": edits,
        **_means(outcomes.values()),
        "noise": final.get("noise"),
        "k_beta": final.get("k_beta"),
        "noise_by_layer": {path: found["noise"] for path, found in line["noise"].items()},
        "k_beta_by_layer": {path: found["k_beta"] for path, found in line["noise"].items()},
        "by_age": [
            {"edits": [start + 1, end], **_means(outcomes[case] for case in case_ids[start:end] if case in outcomes)}
            for start, end in blocks
        ],
        **both,
        **({"also": _also(line["also"])} if line.get("also") else {}),
    }


def _also(found: Record) -> dict[str, Any]:
    """What was measured beside the cases, as numbers: before and after, of drift its own, of ability with the difference. What lies
    behind them (texts, t-SNE's points, single cases) stays in the line."""
    made: dict[str, Any] = {name: rounded(found[name]) for name in ("perplexity",) if name in found}
    if "fluency" in found:
        made["fluency"] = rounded({when: fmean(found["fluency"][when]) if found["fluency"][when] else None for when in WHENS})
    if "ability" in found:
        before, after = (found["ability"][when] for when in WHENS)
        made["ability"] = {task: {"n": after[task]["n"], **scores} for task, scores in difference(before, after).items()}
    if "drift" in found:
        made["drift"] = {name: value for name, value in found["drift"].items() if name != "points"}
    if "extended" in found:
        made["extended"] = {when: rounded(summarise_extended([case[when] for case in found["extended"].values()])) for when in WHENS}
    return made


def _outcomes(plan: Plan, line: Record, right_after: Mapping[str, Record], case_ids: Sequence[str]) -> dict[str, Record]:
    """Case id -> its outcome at this checkpoint, in the order of the edits."""
    found = right_after if plan.measure == "after-each" else line.get("outcomes", {})
    return {case: found[case] for case in case_ids[: line.get("edits", 0)] if case in found}


def _means(outcomes: Iterable[Record]) -> dict[str, float | None]:
    """Per cent; with the share of edit prompts that the model continues with exactly the new answer, where that was asked."""
    listed = list(outcomes)
    written = [outcome["generation"] for outcome in listed if "generation" in outcome]  # the last checkpoint has it
    return rounded(summarise(listed) | ({"generation": 100 * fmean(written)} if written else {}))


def _scalars(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.items() if name != "edits" and not isinstance(value, list | Mapping)}


def _last_layer(by_path: Mapping[str, Record]) -> Record:
    """What stands under the path with the highest number of a layer."""

    def layer(path: str) -> int:
        number = re.search(r"\.(\d+)\.", path)
        return int(number[1]) if number else -1

    return by_path[max(by_path, key=layer)] if by_path else {}


def _means_of(diagnostics: Sequence[Record]) -> dict[str, float]:
    """Mean of each number that every edit has, times aside."""
    made = {}
    for name in diagnostics[0] if diagnostics else []:
        values = [record[name] for record in diagnostics if isinstance(record.get(name), int | float)]
        if len(values) == len(diagnostics) and not name.startswith("seconds"):
            made[name] = round(fmean(values), 6)
    return made


def _stages(lines: Sequence[Record]) -> dict[str, float | None]:
    """Mean seconds of each stage that the method names, and of applying."""
    names = sorted({name for line in lines for name in line["diagnostics"] if name.startswith(STAGE)})
    stages = {name.removeprefix(STAGE): [line["diagnostics"].get(name, 0.0) for line in lines] for name in names}
    stages["apply"] = [line["seconds"]["apply"] for line in lines]
    return {stage: _per_case(lines, seconds) for stage, seconds in stages.items()}


def _per_case(lines: Sequence[Record], seconds: Sequence[float]) -> float | None:
    cases = sum(len(line["cases"]) for line in lines)
    return sum(seconds) / cases if cases else None
