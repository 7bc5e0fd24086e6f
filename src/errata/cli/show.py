"""Printing: results to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

COLUMNS = {
    "reliability": "Rel",
    "generality": "Gen",
    "portability": "Por",
    "locality": "Loc",
    "one_hop": "1-hop",
    "multi_hop": "multi-hop",
    "average": "Avg.",
    "generation": "EM",
}
SEQUENCE_COLUMNS = {
    "efficacy_top": "Eff↑",
    "generalization_top": "Gen↑",
    "specificity_top": "Spe↑",
    "efficacy_larger": "Eff>",
    "generalization_larger": "Gen>",
    "specificity_larger": "Spe>",
    "score": "S",
    "generation": "EM",
}
WIDTH_WHERE_NO_TERMINAL = 120


def json_out(value: Any) -> None:
    """The machine's form, on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def note(text: str) -> None:
    """A remark for the reader, on stderr."""
    sys.stderr.write(text + "\n")


def table(results: Mapping[str, Any]) -> None:
    """The table of a run: percentages, with the half width of their 95 % interval, seconds an edit, peak memory; see also `_sequences`."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    if any("checkpoints" in row["metrics"] for row in rows):
        return _sequences(results)
    there = [name for name in COLUMNS if any(row["metrics"].get(name) is not None for row in rows)]
    seeds, failed = len({row["seed"] for row in rows}) > 1, any(row.get("failed") for row in rows)
    drawn = Table("method", "objective", box=None, pad_edge=False)
    counts = ["n", *(["seed"] if seeds else [])]
    for heading in [*counts, *(COLUMNS[name] for name in there), "s/edit", "MB", *(["failed"] if failed else [])]:
        drawn.add_column(heading, justify="right")
    for row in rows:
        cells = [row["method"], row["objective"], str(row["n"])]
        if seeds:
            cells.append(str(row["seed"]))
        cells += [_with_interval(row["metrics"].get(name), row["intervals"].get(name)) for name in there]
        cells += [_figure(row["seconds_per_edit"], 2), _figure(row["peak_memory_mb"], 0)]
        drawn.add_row(*cells, *([str(row["failed"])] if failed else []))
    _print(drawn)
    if over := results.get("over_seeds"):
        _print(_over_seeds(over, there))
    _print(
        Text(
            f"Per cent ± half a 95 % bootstrap interval, {_when(rows[0])}. Rel, Gen, Por, Loc: teacher-forced token accuracy. "
            "EM: greedy generation on the edit prompt, exact match."
            + (" 1-hop, multi-hop: questions answered in the model's own words, temperature 0.1." if "one_hop" in there else ""),
            style="dim",
        )
    )


def _when(row: Mapping[str, Any]) -> str:
    """How the edits of single cases followed one another, and when the cases were measured."""
    if "blocks" not in row:
        return "measured after each edit"
    size, blocks, last = row["protocol"].partition(":")[2], row["blocks"], row["last_block"]
    short = "" if str(last) == size else f" (the last one {last})" if blocks > 1 else f" ({last}: there are no more cases)"
    return f"{row['protocol']}: {blocks} times {size} edits in a row{short}, measured: {row['measure']}"


def _over_seeds(rows: Sequence[Mapping[str, Any]], there: Sequence[str]) -> Table:
    """Means over the seeds, with their standard deviation."""
    drawn = Table("method", "objective", box=None, pad_edge=False, title=f"mean of {len(rows[0]['seeds'])} seeds ± standard deviation")
    for heading in ["n", *(COLUMNS[name] for name in there), "s/edit"]:
        drawn.add_column(heading, justify="right")
    for row in rows:
        figures = [f"{row['mean'][name]:.1f} ±{row['deviation'][name]:.1f}" if name in row["mean"] else _figure(None) for name in there]
        drawn.add_row(row["method"], row["objective"], str(row["n"]), *figures, _figure(row["seconds_per_edit"], 2))
    return drawn


def _sequences(results: Mapping[str, Any]) -> None:
    """The tables of sequences: where each row ended, how it came there, and the means over the seeds if there are several."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    over: Sequence[Mapping[str, Any]] = results.get("over_seeds", [])
    there = [name for name in SEQUENCE_COLUMNS if any(row["metrics"].get(name) is not None for row in rows)]
    seeds = ["seed"] if over else []

    def owner(row: Mapping[str, Any]) -> list[str]:
        return [row["method"], row["objective"], *([str(row["seed"])] if over else [])]

    drawn = _with_columns(["method", "objective", *seeds], ["n", *(SEQUENCE_COLUMNS[name] for name in there), "noise", "s/edit", "failed"])
    for row in rows:
        cells = [_with_interval(row["metrics"].get(name), row["intervals"].get(name)) for name in there]
        noise = _power(row["metrics"].get("noise"))
        drawn.add_row(*owner(row), str(row["n"]), *cells, noise, _figure(row["seconds_per_edit"], 2), str(row["failed"]))
    _print(drawn)
    if over:
        ends = [(entry["method"], entry["objective"], str(entry["n"]), entry) for entry in over]
        _print(_spreads(f"mean of {len(over[0]['seeds'])} seeds ± standard deviation", "n", ends, there))
        marks = [(entry["method"], entry["objective"], str(mark["edits"]), mark) for entry in over for mark in entry["checkpoints"]]
        _print(_spreads("on the way, mean over seeds", "edits", marks, there))
    else:
        drawn = _with_columns(["method", "objective"], ["edits", *(SEQUENCE_COLUMNS[name] for name in there), "noise", "kᵀβ"])
        drawn.title = "on the way"
        for row in rows:
            for mark in row["metrics"]["checkpoints"]:
                cells = [_figure(mark.get(name)) for name in there]
                drawn.add_row(*owner(row), str(mark["edits"]), *cells, _power(mark["noise"]), _power(mark["k_beta"]))
        _print(drawn)
    if any("also" in mark for row in rows for mark in row["metrics"]["checkpoints"]):
        _print(_beside(rows, owner, seeds))
    _print(
        Text(
            f"{rows[0]['protocol']}, {rows[0]['batch']} at a time, measured: {rows[0]['measure']}. "
            "Per cent ± half a 95 % bootstrap interval. ↑: the answer is on top. >: it is likelier than its rival. "
            "Eff: edit prompts, Gen: rephrasings, Spe: neighbours keep the model's own answer. S: harmonic mean of the three with >. "
            "EM: greedy generation on the edit prompt, exact match. noise, kᵀβ: of the last edited layer.",
            style="dim",
        )
    )


def _moved(one: Mapping[str, float | None], digits: int = 1) -> str:
    """What it is, and by how much it moved."""
    before, after = one["before"], one["after"]
    return "" if before is None or after is None else f"{after:.{digits}f} ({after - before:+.{digits}f})"


def _able(also: Mapping[str, Any]) -> str:
    """Accuracy in the mean over the tasks that have one."""
    scores = [task["accuracy"] for task in also.get("ability", {}).values() if "accuracy" in task]
    return _moved({when: fmean(one[when] for one in scores) for when in ("before", "after")}) if scores else ""


BESIDE: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "perplexity": lambda also: _moved(also["perplexity"], 2) if "perplexity" in also else "",
    "ability": _able,
    "drift": lambda also: _figure(also["drift"]["relative_l2"], 3) if "drift" in also else "",
    "fluency": lambda also: _moved(also["fluency"], 2) if "fluency" in also else "",
    "as a question": lambda also: _figure(also["extended"]["after"]["question_exact"]) if "extended" in also else "",
    "denied": lambda also: _figure(also["extended"]["after"]["negation"]) if "extended" in also else "",
}
"""Heading -> the cell, empty where nothing was measured."""


def _beside(rows: Sequence[Mapping[str, Any]], owner: Callable[[Mapping[str, Any]], list[str]], seeds: Sequence[str]) -> Table:
    """What was measured beside the cases at the end (`errata.bench.also`)."""
    ends = [(row, (row["metrics"]["checkpoints"] or [{}])[-1].get("also", {})) for row in rows]
    there = [name for name, cell in BESIDE.items() if any(cell(also) for _, also in ends)]
    drawn = _with_columns(["method", "objective", *seeds], there)
    drawn.title = "beside the cases, at the end (in brackets: the difference to the unedited model; errata report says more)"
    for row, also in ends:
        drawn.add_row(*owner(row), *(BESIDE[name](also) or "–" for name in there))
    return drawn


def _spreads(title: str, count: str, rows: Sequence[tuple[str, str, str, Mapping[str, Any]]], there: Sequence[str]) -> Table:
    """(method, objective, count, {"mean", "deviation"}) a line."""
    drawn = _with_columns(["method", "objective"], [count, *(SEQUENCE_COLUMNS[name] for name in there), "noise"])
    drawn.title = title
    for method, objective, number, entry in rows:
        mean, deviation = entry["mean"], entry["deviation"]
        cells = [f"{mean[name]:.1f} ±{deviation[name]:.1f}" if name in mean else _figure(None) for name in there]
        noise = f"{_power(mean['noise'])} ±{_power(deviation['noise'])}" if "noise" in mean else _figure(None)
        drawn.add_row(method, objective, number, *cells, noise)
    return drawn


def _with_columns(text: Sequence[str], figures: Sequence[str]) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for heading in text:
        drawn.add_column(heading, no_wrap=True)
    for heading in figures:
        drawn.add_column(heading, justify="right", no_wrap=heading in ("noise", "kᵀβ"))
    return drawn


def before_and_after(rows: Sequence[Mapping[str, str]]) -> None:
    """What the model wrote, side by side."""
    edited = any("after" in row for row in rows)
    drawn = Table("prompt", *(["before", "after"] if edited else ["the model goes on"]), pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(row[name].strip().replace("\n", " ⏎ ")) for name in ("prompt", "before", "after") if name in row))
    _print(drawn)


def shares(result: Mapping[str, Any]) -> None:
    """One figure a line: shares (floats between 0 and 1) as percentages, counts as they are."""
    drawn = Table("", "", box=None, show_header=False, pad_edge=False)
    for name, value in result.items():
        drawn.add_row(name.replace("_", " "), f"{100 * value:.1f} %" if isinstance(value, float) else str(value))
    _print(drawn)


def percentages(result: Mapping[str, Any]) -> None:
    """What `errata.bench.run.evaluate` gives: one metric a line, in per cent, with the half width of its interval."""
    drawn = Table("", "", box=None, show_header=False, pad_edge=False)
    for name, value in result["metrics"].items():
        if value is not None:
            drawn.add_row(name.replace("_", " "), f"{_with_interval(value, result['intervals'].get(name))} %")
    drawn.add_row("cases", str(result["n"]))
    _print(drawn)


def listing(rows: Sequence[Mapping[str, str]]) -> None:
    """Names with what stands behind them."""
    drawn = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(text) for text in row.values()))
    _print(drawn)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function (done, of, what) that shows how far a long command is: a bar on a terminal, else a line for each tenth."""
    console = Console(stderr=True)
    if not console.is_terminal:
        shown = -1

        def line(done: int, of: int, what: str) -> None:
            nonlocal shown
            if (tenth := 10 * done // max(of, 1)) != shown:
                shown = tenth
                note(f"{title}: {done} of {of} · {what}")

        yield line
        return
    what = TextColumn("{task.description}")
    with Bar(TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), what, console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of, what: bar.update(task, completed=done, total=of, description=what)


def _print(drawn: Table | Text) -> None:
    console = Console(highlight=False, markup=False)  # "[/b]" in a note is a note
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=max(console.width, WIDTH_WHERE_NO_TERMINAL))
    console.print(drawn)


def _figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _power(value: float | None) -> str:
    """Three digits, whatever the size."""
    return "–" if value is None else f"{value:.3g}"


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    if value is None or not interval or interval[0] is None or interval[1] is None:
        return _figure(value)
    return f"{value:.1f} ±{(interval[1] - interval[0]) / 2:.1f}"
