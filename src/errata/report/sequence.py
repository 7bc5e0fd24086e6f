"""The pictures of a sequence, with the axes of DeltaEdit's figures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from errata.report import DrawingError
from errata.report.tables import Results, about, by_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "deltaedit": "#D55E00",
    "alphaedit": "#0072B2",
    "memit": "#009E73",
    "memit+history": "#56B4E9",
    "rect": "#E69F00",
    "prune": "#000000",
    "rome": "#CC79A7",
    "ft-l": "#7F7F7F",
}
"""A method has the same colour in every picture; after Okabe and Ito, who chose them for colour-blind readers too."""
MARKERS = "osD^vPXd"
APART = 30
"""Values so many times as large as others are drawn on a logarithmic axis, where both can be seen."""


@dataclass(frozen=True)
class Curve:
    """x -> mean over the seeds, with the lowest and the highest of them."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def through(cls, points: Mapping[float, Sequence[float]]) -> Curve:
        """x -> the seeds' values; an x without any is left out."""
        there = {x: values for x, values in sorted(points.items()) if values}
        values = there.values()
        return cls(list(there), [fmean(some) for some in values], [min(some) for some in values], [max(some) for some in values])


def draw(name: str, results: Results, to: str | Path) -> None:
    """Write the picture of that name (see `errata.report.PICTURES`) as PNG or SVG, by the ending of `to`.

    Raises DrawingError where the run does not hold it, ImportError without matplotlib (`errata[plots]`).
    """
    picture(name, results).savefig(to, dpi=150)


def picture(name: str, results: Results) -> Figure:
    """What `draw` writes."""
    makers: Mapping[str, Callable[[Results], Figure]] = {
        "efficacy-and-noise": efficacy_and_noise,
        "k-beta": k_beta,
        "noise-by-layer": noise_by_layer,
        "eta": eta,
    }
    return makers[name](results)


def efficacy_and_noise(results: Results) -> Figure:
    """Figures 1 and 4a: solid, left, Efficacy_top in per cent; dashed, right, noise_E of the last edited layer."""
    efficacy = _over_edits(results, lambda mark: mark["efficacy_top"])
    noise = _over_edits(results, lambda mark: mark["noise"])
    figure, (axes,) = _figure(results)
    other = axes.twinx()
    handles: dict[str, Any] = {}
    for label, (colour, marker) in styles([*efficacy, *noise]).items():
        if label in noise:
            line(other, noise[label], colour, marker, dashed=True)
        if label in efficacy:
            handles[label] = line(axes, efficacy[label], colour, marker)
    axes.set(xlabel="number of edits", ylabel="Efficacy$_{top}$ (%), solid", ylim=(-3, 103))
    other.set_ylabel("noise$_E$ of the last edited layer, dashed")
    scale(other, noise.values())
    axes.set_zorder(other.get_zorder() + 1)  # the solid lines lie above the dashed ones
    axes.patch.set_visible(False)
    legend_below(figure, handles)
    return figure


def k_beta(results: Results) -> Figure:
    """Figure 2: the mean kᵢᵀβⱼ, i ≠ j (eq. 15), of the last edited layer."""
    curves = _over_edits(results, lambda mark: mark["k_beta"])
    if not curves:
        raise DrawingError("no row of this run has kᵀβ; it takes methods whose edits are of low rank, and two of them")
    figure, (axes,) = _figure(results)
    _lines(figure, [axes], [curves])
    axes.set(xlabel="number of edits", ylabel=r"mean $k^\top\beta$ of the last edited layer")
    scale(axes, curves.values())
    return figure


def noise_by_layer(results: Results) -> Figure:
    """Figures 5 and 6: noise_E, a panel for each edited layer."""
    paths = {
        path: None
        for rows in by_label(results).values()
        for row in rows
        for mark in row["metrics"]["checkpoints"]
        for path, value in mark["noise_by_layer"].items()
        if value is not None
    }
    if not paths:
        raise DrawingError("no row of this run has noise; it takes methods that write into a layer, and two edits")
    panels = sorted(paths, key=lambda path: (layer_of(path), path))
    columns = min(len(panels), 3)
    figure, axes = _figure(results, math.ceil(len(panels) / columns), columns)
    shown = axes[: len(panels)]
    for spare in axes[len(panels) :]:
        spare.remove()
    by_panel = [_over_edits(results, partial(_noise_at, path)) for path in panels]
    _lines(figure, shown, by_panel)
    for panel, path, curves in zip(shown, panels, by_panel, strict=True):
        number = layer_of(path)
        panel.set_title(f"layer {number}" if number >= 0 else path, fontsize=10)
        panel.set_xlabel("number of edits")
        scale(panel, curves.values())
    for first in shown[::columns]:
        first.set_ylabel("noise$_E$")
    return figure


def eta(results: Results) -> Figure:
    """Figure 9: Efficacy, Generalization, Specificity on top after the last edit, over η of the rows deltaedit@eta=…"""
    rows = [row for same in by_label(results).values() for row in same if row["method"].startswith("deltaedit@eta=") and row["settings"]]
    values = {row["settings"]["method"]["eta"] for row in rows}
    if len(values) < 2:
        raise DrawingError("this picture needs rows deltaedit@eta=… with at least two values of η, and settings that give each its own")
    figure, (axes,) = _figure(results)
    names = {"efficacy_top": "Eff.", "generalization_top": "Gen.", "specificity_top": "Spe."}
    handles: dict[str, Any] = {}
    for (name, label), colour, marker in zip(names.items(), COLOURS.values(), MARKERS, strict=False):
        points: dict[float, list[float]] = {value: [] for value in values}
        for row in rows:
            if (value := row["metrics"].get(name)) is not None:
                points[row["settings"]["method"]["eta"]].append(value)
        handles[f"{label}$_{{top}}$"] = line(axes, Curve.through(points), colour, marker)
    axes.set(xlabel=r"$\eta$", ylabel=f"after {rows[0]['metrics']['checkpoints'][-1]['edits']} edits (%)", xticks=sorted(values))
    legend_below(figure, handles)
    return figure


def layer_of(path: str) -> int:
    """The number in the path of a module, -1 where there is none."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else -1


def _noise_at(path: str, mark: Mapping[str, Any]) -> float | None:
    noise: float | None = mark["noise_by_layer"].get(path)
    return noise


def _over_edits(results: Results, value: Callable[[Mapping[str, Any]], float | None]) -> dict[str, Curve]:
    """Method -> the curve of a value over its checkpoints; without methods that have none."""
    curves = {}
    for label, rows in by_label(results).items():
        points: dict[float, list[float]] = {}
        for row in rows:
            for mark in row["metrics"]["checkpoints"]:
                if (found := value(mark)) is not None:
                    points.setdefault(mark["edits"], []).append(found)
        if points:
            curves[label] = Curve.through(points)
    return curves


def _figure(results: Results, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    size = (6.4, 4.4) if columns == 1 else (3.2 * columns + 0.6, 2.6 * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(about(results), fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7 if columns == 1 else 4, steps=[1, 2, 5, 10], integer=True))
    return figure, list(panels.flat)


def _lines(figure: Figure, panels: Sequence[Axes], curves: Sequence[Mapping[str, Curve]]) -> None:
    """A line a method in each panel, and one legend for all."""
    handles: dict[str, Any] = {}
    for label, (colour, marker) in styles([label for some in curves for label in some]).items():
        for axes, some in zip(panels, curves, strict=True):
            if label in some:
                handles[label] = line(axes, some[label], colour, marker)
    legend_below(figure, handles)


def line(axes: Axes, curve: Curve, colour: str, marker: str, dashed: bool = False) -> Any:
    """Draw a curve with a band from its lowest to its highest seed; the line, for a legend."""
    (line,) = axes.plot(
        curve.x,
        curve.mean,
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.8,
        linestyle="--" if dashed else "-",
        markerfacecolor="white" if dashed else colour,
    )
    if curve.low != curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    return line


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Below the axes, never over the data."""
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label -> colour and marker: a method's own colour, whatever objective its label names, and for all other labels those that are
    left. Of several labels of one method only the plain one has its colour."""
    names = list(dict.fromkeys(labels))
    methods = [name.partition(" + ")[0] for name in names]
    own = {
        name: COLOURS[method] for name, method in zip(names, methods, strict=True)
        if method in COLOURS and (name == method or methods.count(method) == 1)
    }  # fmt: skip
    free = cycle([colour for colour in COLOURS.values() if colour not in own.values()] or list(COLOURS.values()))
    return {name: (own.get(name) or next(free), marker) for name, marker in zip(names, cycle(MARKERS), strict=False)}


def scale(axes: Axes, curves: Collection[Curve]) -> None:
    """Logarithmic where some values are `APART` times as large as others; where some are not positive, linear around 0."""
    sizes = [some for curve in curves if (some := [abs(value) for value in curve.mean if value])]
    peaks = [max(some) for some in sizes]
    if not sizes or (max(peaks) < APART * min(peaks) and all(max(some) < APART * median(some) for some in sizes)):
        return
    lowest, highest = min(value for curve in curves for value in curve.low), max(value for curve in curves for value in curve.high)
    if lowest > 0:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 2, highest * 2)
        return
    near = 10.0 ** math.floor(math.log10(min(median(some) for some in sizes)))
    axes.set_yscale("symlog", linthresh=near)
    axes.set_ylim(min(2 * lowest, -near / 2), max(2 * highest, near / 2))
