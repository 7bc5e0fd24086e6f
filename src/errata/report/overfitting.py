"""The pictures of OVERTONE: what a single edit does at each step (Figures 1, 2), and continual editing (Figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from errata.report import DrawingError
from errata.report.sequence import COLOURS, Curve, legend_below
from errata.report.tables import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("figure1", "figure2", "figure3")
PANELS = {"reliability": "the edit itself", "generality": "generality (rephrased)", "portability": "portability (reasoning)"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""After Okabe and Ito, who chose them for colour-blind readers too."""
WIDEST = 40
"""So many places of an answer are drawn; beyond them stand few answers."""


def picture(name: str, results: Results) -> Figure:
    """The picture of that name (see `errata.report.PICTURES`). Raises DrawingError where the run does not hold it."""
    makers: dict[str, Callable[[Results], Figure]] = dict(zip(NAMES, (figure1, figure2, figure3), strict=True))
    return makers[name](results)


def draw(name: str, results: Results, to: str | Path) -> None:
    """Write `picture` as PNG or SVG, by the ending of `to`. Raises DrawingError, ImportError without matplotlib (`errata[plots]`)."""
    picture(name, results).savefig(to, dpi=150)


def figure1(results: Results) -> Figure:
    """Figure 1: the mean loss of an answer over the training steps, a panel for each kind of question; dotted: before the edit."""
    groups = _curves(results)
    last = max(some["steps"] for same in groups.values() for some in same)
    kinds = [kind for kind in PANELS if any(kind in some["loss"] for same in groups.values() for some in same)]
    figure, panels = _figure(f"{_about(results)}, {_edits(groups)}", 1, len(kinds))
    handles: dict[str, Any] = {}
    for kind, axes in zip(kinds, panels, strict=True):
        for (label, same), (colour, dashes) in zip(groups.items(), _styles(groups), strict=True):
            curve = _over_steps([some["loss"][kind] for some in same if kind in some["loss"]], last)
            handles[f"{label} ({fmean(some['mean_steps'] for some in same):.3g} steps an edit)"] = _line(axes, curve, colour, dashes)
            axes.axhline(curve.mean[0], color="0.5", linestyle=":", linewidth=1)
        axes.set(title=PANELS[kind], xlabel="training step")
        axes.set_ylim(-0.03 * axes.get_ylim()[1], axes.get_ylim()[1])  # a line that runs along 0 is seen whole
    panels[0].set_ylabel("loss of the answer")
    legend_below(figure, handles)
    return figure


def figure2(results: Results) -> Figure:
    """Figure 2: initial loss by token (a), UD by token when half of the tokens are over-fitted (b), and their share over the steps (c).

    Dashed in (a) and (b): the mean over all tokens. The initial loss is the unedited model's, so one row is enough.
    """
    groups = _curves(results)
    figure, (first, second, third) = _figure(f"{_about(results)}, {_edits(groups)}", 1, 3)
    one = next(iter(groups.values()))[0]
    last = max(some["steps"] for same in groups.values() for some in same)
    places = range(1, min(len(one["positions"]), WIDEST) + 1)
    first.bar(places, [_number(place["initial"]) for place in one["positions"][:WIDEST]], color="0.55", width=0.8)
    first.axhline(_number(one["initial"]), color="0.2", linestyle="--", linewidth=1.2)
    first.set(title="(a) before the edit", ylabel="initial loss")
    width = 0.8 / len(groups)
    handles: dict[str, Any] = {}
    for i, ((label, same), (colour, dashes)) in enumerate(zip(groups.items(), _styles(groups), strict=True)):
        some = same[0]
        middle = [place + (i + 0.5) * width - 0.4 for place in places]
        second.bar(middle, [_number(place["ud"]) for place in some["positions"][:WIDEST]], color=colour, width=width)
        second.axhline(_number(some["ud"]), color=colour, linestyle="--", linewidth=1.2)
        curve = _over_steps([[100 * share for share in some["overfitted"]] for some in same], last)
        handles[f"{label} ({_when(some)})"] = _line(third, curve, colour, dashes)
    second.axhline(0, color="0.2", linewidth=0.8)
    second.set(title="(b) when half are over-fitted", ylabel="UD (< 0: over-fitted)")
    for axes in (first, second):
        if names := one.get("tokens"):
            axes.set(xlabel="token of the answer", xticks=list(places))
            axes.set_xticklabels([name.replace("$", r"\$") for name in names[:WIDEST]], rotation=90 if len(places) > 6 else 0)
        elif len(places) <= 8:
            axes.set(xlabel="token of the answer (of how many)", xticks=list(places))
            axes.set_xticklabels([f"{place} ({cell['tokens']})" for place, cell in zip(places, one["positions"], strict=True)])
        else:
            axes.set_xlabel("token of the answer")
    third.set(title="(c) over-fitted tokens", xlabel="training step", ylabel="% of all tokens", ylim=(-3, 103))
    legend_below(figure, handles)
    return figure


def figure3(results: Results) -> Figure:
    """Figure 3: Avg. over T edits in a row, a panel for each data set. Solid: cross-entropy. Transparent, with a dark frame: OVERTONE;
    what stands out of the solid bar is what it gains, and a frame that ends inside it shows what it loses."""
    from matplotlib.patches import Patch

    rows = [row for row in results["rows"] if _length(row) is not None and row["metrics"].get("average") is not None]
    if not rows:
        raise DrawingError("this run holds no single or continual edits; figure3 shows those: errata bench --protocol single")
    sets = list(dict.fromkeys(_data(row, results) for row in rows))
    lengths = sorted({length for row in rows if (length := _length(row)) is not None})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, _colours(methods), strict=True))
    figure, panels = _figure(str(results["environment"]["model"]).rpartition("/")[2], 1, len(sets))
    width = min(0.84 / len(methods), 0.3)
    for name, axes in zip(sets, panels, strict=True):
        for group, length in enumerate(lengths):
            for i, method in enumerate(methods):
                same = [row for row in rows if (_data(row, results), _length(row), row["method"]) == (name, length, method)]
                place = group + (i - (len(methods) - 1) / 2) * width
                for objective in ("overtone", "ce"):
                    if values := [row["metrics"]["average"] for row in same if row["objective"] == objective]:
                        solid = objective == "ce"
                        axes.bar(
                            place, fmean(values), 0.9 * width, color=(colours[method], 1.0 if solid else 0.3),
                            edgecolor="0.15", linewidth=0.0 if solid else 1.0, zorder=2 if solid else 3,
                        )  # fmt: skip
        axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
        axes.set(title=name, xlabel="edits in a row, T", ylim=(0, 103), xlim=(-0.6, len(lengths) - 0.4))
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("Avg. (%)")
    kinds = {row["objective"] for row in rows}
    shown = {method: Patch(color=colour) for method, colour in colours.items()}
    shown |= {"ce (solid)": Patch(color="0.4")} if "ce" in kinds else {}
    shown |= {"overtone (transparent)": Patch(facecolor=("0.4", 0.3), edgecolor="0.15")} if "overtone" in kinds else {}
    legend_below(figure, shown)
    return figure


def together(runs: Sequence[Results]) -> dict[str, Any]:
    """The rows of several runs as those of one, each with the data that it was made from."""
    rows = [row | {"data": _data(row, run)} for run in runs for row in run["rows"]]
    return {"rows": rows, "environment": runs[0]["environment"]}


def _curves(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Method + objective -> its curves, one a seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if some := row.get("curves"):
            groups.setdefault(f"{row['method']}+{row['objective']}", []).append(some)
    if not groups:
        raise DrawingError(
            "this run has no curves; make some with: errata bench --protocol single --curves, and an editor that is trained step by step "
            "(ft-m, ft-l, lora …): locate-then-edit editors write in one step"
        )
    return groups


def _over_steps(series: Sequence[Sequence[float | None]], last: int) -> Curve:
    """The seeds' curves as one; each stays where it stopped, up to the step `last`."""
    points: dict[float, list[float]] = {}
    for step in range(last + 1):
        points[step] = [value for one in series if (value := one[min(step, len(one) - 1)]) is not None]
    return Curve.through(points)


def _line(axes: Axes, curve: Curve, colour: str, dashes: str) -> Any:
    (line,) = axes.plot(curve.x, curve.mean, color=colour, linestyle=dashes, linewidth=1.8)
    if curve.low != curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    return line


def _styles(labels: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, str]]:
    """Colour and line of each label; OVERTONE's are dashed."""
    return [(colour, "--" if label.endswith("+overtone") else "-") for label, colour in zip(labels, cycle(PALETTE), strict=False)]


def _colours(methods: Sequence[str]) -> list[str]:
    """A method that has its own colour elsewhere has it here."""
    free = cycle([colour for colour in PALETTE if colour not in {COLOURS.get(method) for method in methods}] or PALETTE)
    return [COLOURS.get(method) or next(free) for method in methods]


def _figure(title: str, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(3.4 * columns, 5.0), 3.6 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, panels


def _length(row: Mapping[str, Any]) -> int | None:
    """T: 1 for single edits, None for another protocol."""
    name, _, number = str(row.get("protocol", "")).partition(":")
    return 1 if name == "single" else int(number) if name == "continual" else None


def _data(row: Mapping[str, Any], results: Results) -> str:
    return str(row.get("data") or _name(results["environment"]["data"]))


def _about(results: Results) -> str:
    where = results["environment"]
    return f"{_name(where['model'], whole=True)} on {_name(where['data'])}"


def _name(path: Any, whole: bool = False) -> str:
    """The last part of a path, without an ending where it is a file's."""
    short = str(path).rstrip("/").rpartition("/")[2]
    return short if whole else short.rpartition(".")[0] or short


def _edits(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    number = max(sum(some["edits"] for some in same) for same in groups.values())
    return "one edit" if number == 1 else f"{number} edits"


def _when(some: Mapping[str, Any]) -> str:
    return f"half at step {some['half']}" if some["half"] is not None else "never half; (b) shows the end"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
