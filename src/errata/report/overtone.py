"""OVERTONE's Tables 1 to 5: each method, then the same with OVERTONE, and what that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from errata.report import DrawingError
from errata.report.tables import Results, Sheet

HEADINGS = {
    "reliability": "Rel.",
    "generality": "Gen.",
    "portability": "Por.",
    "locality": "Loc.",
    "one_hop": "1-Hop.",
    "multi_hop": "2-Hop.",
    "average": "Avg.",
    "generation": "EM",
}
"""The paper's columns, and exact match under generation beside them."""
Rows = Sequence[Mapping[str, Any]]


def sheets(results: Results) -> list[Sheet]:
    """A table for each data set and number T of edits in a row. Raises DrawingError for a run of another protocol."""
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if str(row.get("protocol", "")).partition(":")[0] in ("single", "continual"):
            parts.setdefault((row.get("data") or _name(results["environment"]["data"]), row["protocol"]), []).append(row)
    if not parts:
        raise DrawingError("this run holds no single or continual edits; make some with: errata bench --protocol single, or continual:T")
    return [_sheet(_name(results["environment"]["model"], whole=True), data, rows) for (data, _), rows in parts.items()]


def _sheet(model: str, data: str, rows: Rows) -> Sheet:
    """Mean ± standard deviation (n - 1) over the seeds, or of one seed the value ± half its bootstrap interval; the best in bold.

    A method stands there with the run's first objective, then with each other, and the difference: the mean, with the deviation, of what
    changes from seed to seed.
    """
    first = next((row["objective"] for row in rows if row["objective"] != "none"), "none")
    names = [name for name in HEADINGS if any(row["metrics"].get(name) is not None for row in rows)]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["objective"]), []).append(row)
    failed = any(row["failed"] for row in rows)
    lines: list[tuple[str, ...]] = []
    means: dict[int, list[float | None]] = {}
    shown = ""
    for (method, objective), same in groups.items():
        plain = objective in (first, "none")
        label = method if plain else f"+ {objective}" if shown == method else f"{method} + {objective}"
        shown = method
        means[len(lines)] = [round(fmean(values), 2) if (values := _values(same, name)) else None for name in names]
        count = (f"{sum(row['failed'] for row in same)}",) if failed else ()
        lines.append((label, *(_cell(same, name) for name in names), *count))
        if not plain and (base := groups.get((method, first))):
            changes = [_paired(same, base, name) for name in names]
            lines.append(("difference", *(_spread(values, "{:+.2f}") for values in changes), *([""] if failed else [])))
    tops = [max((value for value in column if value is not None), default=None) for column in zip(*means.values(), strict=True)]
    best = {(i, j + 1) for i, line in means.items() for j, value in enumerate(line) if value is not None and value == tops[j]}
    headings = ("method", *(HEADINGS[name] for name in names), *(["failed"] if failed else []))
    return Sheet(_title(model, data, rows, first), headings, tuple(lines), frozenset(best))


def _title(model: str, data: str, rows: Rows, first: str) -> str:
    """Model, data, T, the number of edits of a seed, what ± is, and the objective where a line names none."""
    name, _, length = str(rows[0]["protocol"]).partition(":")
    seeds = len({row["seed"] for row in rows})
    edits = max(row["n"] + row["failed"] for row in rows if row["seed"] == rows[0]["seed"])
    spread = f"mean of {seeds} seeds ± standard deviation" if seeds > 1 else "± half a 95 % interval"
    each = " a seed" if seeds > 1 else ""
    short = rows[0].get("last_block", length)
    rest = f" (the last row {short})" if name == "continual" and str(short) != length else ""
    when = f", measured {rows[0]['measure']}" if rows[0].get("measure", "after-sequence") != "after-sequence" else ""
    return f"{model} on {data}, T = {length or 1}{rest}{when}, {edits} edits{each}, {spread}; without a name: {first}"


def _values(rows: Rows, name: str) -> list[float]:
    return [row["metrics"][name] for row in rows if row["metrics"].get(name) is not None]


def _cell(rows: Rows, name: str) -> str:
    values = _values(rows, name)
    interval = rows[0]["intervals"].get(name)
    if len(rows) > 1 or not values or not interval or None in interval:
        return _spread(values, "{:.2f}")
    return f"{values[0]:.2f} ±{(interval[1] - interval[0]) / 2:.2f}"


def _paired(rows: Rows, base: Rows, name: str) -> list[float]:
    """What a seed's row has more than the base's row of that seed."""
    before = {row["seed"]: row["metrics"].get(name) for row in base}
    there = [(row["metrics"].get(name), before.get(row["seed"])) for row in rows]
    return [new - old for new, old in there if new is not None and old is not None]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    return form.format(fmean(values)) + (f" ±{stdev(values):.2f}" if len(values) > 1 else "")


def _name(path: Any, whole: bool = False) -> str:
    """The last part of a path, without an ending where it is a file's."""
    short = str(path).rstrip("/").rpartition("/")[2]
    return short if whole else short.rpartition(".")[0] or short
