"""The picture of what moved elsewhere, as DeltaEdit's Figures 4b and 8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.report import DrawingError
from errata.report.sequence import legend_below, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, BEFORE_LINE = "0.84", "0.35"
INSIDE = 0.95
"""The share of a cloud that its dashed ellipse would hold, were it normally distributed."""
COLUMNS = 3

Floats = np.typing.NDArray[np.float64]


def draw(records: Mapping[str, Mapping[str, Any]], to: str | Path, title: str = "") -> None:
    """Write `picture` as PNG or SVG, by the ending of `to`. Raises DrawingError, ImportError without matplotlib (`errata[plots]`)."""
    picture(records, title).savefig(to, dpi=150)


def picture(
    records: Mapping[str, Mapping[str, Any]], title: str = "", columns: int = COLUMNS, looks: Mapping[str, tuple[str, str]] | None = None
) -> Figure:
    """Figures 4b and 8: hidden states in the plane of t-SNE, before in grey and after in the method's colour, a panel a method.

    Above and to the right the marginal distributions (Gaussian kernels, Scott's width). Dashed: each cloud's 95 % ellipse, from its mean
    and covariance. Panels whose states before are the same points (`measure_together`) have the same axes.

    records: label -> what `errata.metrics.drift.measure` or `measure_together` gave; without `points` a label is left out.
    columns: so many panels beside one another. looks: label -> colour and marker; None: by their order.
    Raises DrawingError where none has points.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    clouds = {label: _clouds(record["points"]) for label, record in records.items() if record.get("points")}
    if not clouds:
        raise DrawingError("no record has points; take them with errata.metrics.drift.measure, of at least two prompts")
    columns = min(len(clouds), columns)
    rows = math.ceil(len(clouds) / columns)
    figure = Figure(figsize=(4.5 * columns, 4.6 * rows + 0.7), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in panels[len(clouds) :]:
        spare.remove()
    common = len({before.tobytes() for before, _ in clouds.values()}) == 1
    frames = {label: np.concatenate([part for points in both for part in (points, _ellipse(points).T)]) for label, both in clouds.items()}
    everything = np.concatenate(list(frames.values()))
    handles: dict[str, Any] = {}
    looks = looks or styles(list(clouds))
    for main, (label, (before, after)), (colour, marker) in zip(panels, clouds.items(), (looks[label] for label in clouds), strict=False):
        _limits(main, everything if common else frames[label])
        handles["before"] = main.scatter(*before.T, s=30, color=BEFORE, linewidths=0, zorder=2)
        handles[label] = main.scatter(*after.T, s=8, color=colour, marker=marker, linewidths=0, alpha=0.8, zorder=3)
        top, right = main.inset_axes((0, 1.01, 1, 0.2)), main.inset_axes((1.01, 0, 0.2, 1))  # as wide and high as the panel
        for points, line, width in ((before, BEFORE_LINE, 2.8), (after, colour, 1.2)):  # where nothing moved, both lines are seen
            main.plot(*_ellipse(points), color=line, linestyle="--", linewidth=width, zorder=4)
            _margin(top, points[:, 0], main.get_xlim(), line, width)
            _margin(right, points[:, 1], main.get_ylim(), line, width, upright=True)
        main.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        top.set_title(_heading(label, records[label]), fontsize=9)
    legend_below(figure, handles | {"95 % ellipse": Line2D([], [], color=BEFORE_LINE, linestyle="--")})
    return figure


def _clouds(points: Mapping[str, Sequence[Sequence[float]]]) -> tuple[Floats, Floats]:
    return np.asarray(points["before"], dtype=np.float64), np.asarray(points["after"], dtype=np.float64)


def _heading(label: str, record: Mapping[str, Any]) -> str:
    """The method and, below it, the numbers that the record has."""
    names = {"cosine": "cosine", "relative_l2": "relative L2", "cka": "CKA"}
    said = [f"{name} {record[key]:.3g}" for key, name in names.items() if record.get(key) is not None]
    return "\n".join([label, ", ".join(said)]) if said else label


def _limits(axes: Axes, points: Floats) -> None:
    """The same length both ways, with a little room."""
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2, 0.54 * max(float((high - low).max()), 1e-9)
    axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))


def _ellipse(points: Floats) -> Floats:
    """The outline [2, 100]: Mahalanobis distance² −2 ln(1 − 0.95) = 5.99 from the mean, χ² of two degrees of freedom."""
    angles = np.linspace(0, 2 * np.pi, 100)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    radii = np.sqrt(-2 * math.log(1 - INSIDE) * np.maximum(values, 0.0))
    outline: Floats = points.mean(0)[:, None] + vectors @ (radii[:, None] * np.stack([np.cos(angles), np.sin(angles)]))
    return outline


def _margin(axes: Axes, values: Floats, limits: tuple[float, float], colour: str, width: float, upright: bool = False) -> None:
    places = np.linspace(*limits, 200)
    heights = density(values, places)
    (axes.fill_betweenx if upright else axes.fill_between)(places, 0, heights, color=colour, alpha=0.15, linewidth=0)
    axes.plot(*((heights, places) if upright else (places, heights)), color=colour, linewidth=width)
    (axes.set_ylim if upright else axes.set_xlim)(*limits)
    axes.axis("off")


def density(values: Floats, places: Floats) -> Floats:
    """The density of values [N] at places [P], by Gaussian kernels of Scott's width, σ N^(−1/5)."""
    width = max(float(values.std(ddof=1)) * len(values) ** -0.2, 1e-9)
    kernels = np.exp(-0.5 * ((places[:, None] - values) / width) ** 2)  # [P, N]
    heights: Floats = kernels.mean(1) / (width * math.sqrt(2 * math.pi))
    return heights
