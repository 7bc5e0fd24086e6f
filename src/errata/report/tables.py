"""The tables of a sequence, cell by cell: for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from errata.facts import Fact
from errata.report import DrawingError

Results = Mapping[str, Any]
"""The content of a `results.json`."""
Known = Mapping[tuple[int, str], str]
"""(seed, prompt) -> the edited knowledge that the prompt asks about."""

HEADINGS = {
    "efficacy_top": "Eff↑ top",
    "generalization_top": "Gen↑ top",
    "specificity_top": "Spe↑ top",
    "efficacy_larger": "Eff↑ larger",
    "generalization_larger": "Gen↑ larger",
    "specificity_larger": "Spe↑ larger",
}


@dataclass(frozen=True)
class Sheet:
    """One table; `best` are the (row, column) of the cells to be set in bold, `wide` says that the last column holds running text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    wide: bool = False

    def markdown(self) -> str:
        """As Markdown, with its title in bold above it."""
        align = ["---" if column == 0 or self.wide else "---:" for column in range(len(self.headings))]
        lines = [
            [_escaped(cell) if (i, j) not in self.best else f"**{_escaped(cell)}**" for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in [list(map(_escaped, self.headings)), align, *lines])
        return f"**{_escaped(self.title)}**\n\n{table}\n"

    def latex(self) -> str:
        """As a LaTeX table (booktabs), with its title as caption."""
        others = len(self.headings) - 1
        align = "l" + ("l" * (others - 1) + "p{0.7\\linewidth}" if self.wide else "r" * others)
        lines = [
            [_tex(cell) if (i, j) not in self.best else f"\\textbf{{{_tex(cell)}}}" for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        body = [" & ".join(cells) + " \\\\" for cells in lines]
        return "\n".join([
            "\\begin{table}", "\\centering", f"\\caption{{{_tex(self.title)}}}", f"\\begin{{tabular}}{{{align}}}", "\\toprule",
            " & ".join(map(_tex, self.headings)) + " \\\\", "\\midrule", *body, "\\bottomrule", "\\end{tabular}", "\\end{table}", "",
        ])  # fmt: skip


def sheets(name: str, results: Results, known: Known | None = None) -> list[Sheet]:
    """The tables of that name (see `errata.report.TABLES`). Raises DrawingError where the run does not hold it."""
    from errata.report import overtone

    makers: Mapping[str, Callable[[], list[Sheet]]] = {
        "table1": lambda: [table1(results)],
        "noise-table": lambda: [by_checkpoint(results, "noise", "noise_E")],
        "k-beta-table": lambda: [by_checkpoint(results, "k_beta", "kᵀβ")],
        "overtone-table": lambda: overtone.sheets(results),
        "case-study": lambda: case_study(results, known or {}),
    }
    return makers[name]()


def table1(results: Results) -> Sheet:
    """DeltaEdit's Table 1: a line a method, mean ± standard deviation (n - 1) over the seeds after the last edit, the best in bold."""
    groups = by_label(results)
    names = [name for name in HEADINGS if any(row["metrics"].get(name) is not None for rows in groups.values() for row in rows)]
    found = {label: [_values(rows, name) for name in names] for label, rows in groups.items()}
    means = [[round(fmean(values), 2) if values else None for values in line] for line in found.values()]
    tops = [max((mean for mean in column if mean is not None), default=None) for column in zip(*means, strict=True)]
    best = {(i, j + 1) for i, line in enumerate(means) for j, mean in enumerate(line) if mean is not None and mean == tops[j]}
    cells = tuple((label, *(_spread(values, "{:.2f}".format) for values in line)) for label, line in found.items())
    return Sheet(about(results), ("method", *(HEADINGS[name] for name in names)), cells, frozenset(best))


def by_checkpoint(results: Results, field: str, symbol: str) -> Sheet:
    """DeltaEdit's Tables 2 and 3: a line a method, a column a checkpoint, mean ± standard deviation over the seeds."""
    groups = by_label(results)
    marks = [mark["edits"] for mark in next(iter(groups.values()))[0]["metrics"]["checkpoints"]]
    rows = []
    for label, same in groups.items():
        columns = zip(*([mark[field] for mark in row["metrics"]["checkpoints"]] for row in same), strict=True)
        values = [[value for value in column if value is not None] for column in columns]
        if any(values):
            rows.append((f"{label} {symbol}", *(_spread(value, _number) for value in values)))
    if not rows:
        raise DrawingError(f"no row of this run has {symbol}; it takes methods whose edits are of low rank, and two of them")
    return Sheet(about(results), ("number of edits", *map(str, marks)), tuple(rows))


def case_study(results: Results, known: Known) -> list[Sheet]:
    """DeltaEdit's Tables 4 and 5: for each seed and prompt, what the unedited model writes, and each method's after its last edit."""
    groups = by_label(results)
    several = len({row["seed"] for rows in groups.values() for row in rows}) > 1
    made: dict[tuple[int, str], list[tuple[str, str]]] = {}
    for label, rows in groups.items():
        for row in rows:
            for said in row.get("transcripts", ()):
                lines = made.setdefault((row["seed"], said["prompt"]), [("Original", _written(said, "before"))])
                lines.append((label, _written(said, "after")))
    if not made:
        raise DrawingError("this run has no transcripts; give bench some: --transcript 'Danielle Darrieux was born in'")
    pages = []
    for (seed, prompt), lines in made.items():
        order = f", seed {seed}" if several else ""
        title = f"{about(results)}{order} · edited knowledge: {known.get((seed, prompt), '–')} · prompt: {prompt}"
        pages.append(Sheet(title, ("method", "output"), tuple(lines), wide=True))
    return pages


def edited(prompts: Iterable[str], facts: Sequence[Fact]) -> dict[str, str]:
    """Prompt -> the edited facts whose subject stands in it, as sentences; without prompts about which nothing was edited."""
    found = {
        prompt: "; ".join(f"{fact.text} {fact.target}" for fact in facts if re.search(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", prompt))
        for prompt in prompts
    }
    return {prompt: text for prompt, text in found.items() if text}


def by_label(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Method -> its rows, one a seed; with the objective in the label where there are several. Raises DrawingError for no sequence."""
    rows = results["rows"]
    if not rows or not all(row["metrics"].get("checkpoints") for row in rows):
        raise DrawingError("this run holds no sequence of edits; make one with: errata bench --protocol sequential:N")
    several = len({row["objective"] for row in rows}) > 1
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['method']}+{row['objective']}" if several else row["method"], []).append(row)
    return groups


def about(results: Results) -> str:
    """Model, data and number of edits."""
    where, row = results["environment"], results["rows"][0]
    short = [str(where[name]).rstrip("/").rpartition("/")[2] for name in ("model", "data")]
    return f"{short[0]} on {short[1].rpartition('.')[0] or short[1]}, {row['metrics']['checkpoints'][-1]['edits']} edits"


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row["metrics"][name] for row in rows if row["metrics"].get(name) is not None]


def _spread(values: Sequence[float], spell: Callable[[float], str]) -> str:
    if not values:
        return "–"
    return spell(fmean(values)) + (f" ±{spell(stdev(values))}" if len(values) > 1 else "")


def _number(value: float) -> str:
    """As in the paper: 0.0215, 1.79, 2780.7."""
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.3g}"


def _written(said: Mapping[str, str], which: str) -> str:
    """Prompt and continuation in one line."""
    return " ".join(f"{said['prompt']} {said[which].strip()}".split())


def _tex(text: str) -> str:
    """What LaTeX would take for its own, and the signs that its fonts lack."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", " ".join(text.split()).replace("\\", r"\textbackslash "))
    signs = {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "→": r"$\to$", "↑": r"$\uparrow$", "−": "--"}
    signs |= {"<": "$<$", ">": "$>$", "|": r"\textbar{}"}
    return "".join(signs.get(sign, sign) for sign in text)


def _escaped(text: str) -> str:
    """What Markdown would take for its own."""
    return re.sub(r"([\\|*_`<>\[\]!~$&])", r"\\\1", " ".join(text.split()))
