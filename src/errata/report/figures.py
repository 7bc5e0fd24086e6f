"""The pictures of a report as SVG that goes into its page: text stays text, and what is black takes the page's own colour.

Each comes with the same in words and numbers, for whoever cannot see it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from errata.bench.folder import Record
from errata.report.beside import times
from errata.report.board import span
from errata.report.drift import picture as clouds
from errata.report.sequence import Curve, legend_below, line, scale, styles
from errata.report.story import Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour, which is light in the dark; no picture has it otherwise."""
PAGE = {"#d6d6d6": "faint", "#595959": "soft"}
"""Greys of the picture of drift that are the page's own: what is faint on white would shine in the dark."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": "#808080",
}
WIDE = 7.2
"""Inches; the page lets it shrink to its own width."""


@dataclass(frozen=True)
class Picture:
    """title, and what it shows in a sentence; what draws it; headings and rows of the table behind it."""

    title: str
    about: str
    draw: Callable[[], Figure]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def svg(self) -> str:
        """The picture as an element of a page. Raises ImportError without matplotlib (`errata[plots]`)."""
        return _svg(self.draw)


def pictures(story: Story) -> dict[str, list[Picture]]:
    """The pictures that the story has data for, by the part of the report that they belong to."""
    makers: Mapping[str, Sequence[Callable[[Story], Picture | None]]] = {
        "worked": (led_and_written,),
        "cost": (drifted,),
        "goes-on": (over_edits, perplexity, ability, drift, noise, by_age),
    }
    return {part: [made for make in some if (made := make(story)) is not None] for part, some in makers.items()}


def led_and_written(story: Story) -> Picture | None:
    """For each method what it scores when it is led beside what it writes by itself."""
    found = [(one, one.cell("reliability") or one.cell("efficacy_top"), one.cell("exact")) for one in story.lines]
    there = [(one, led, said) for one, led, said in found if led is not None and said is not None]
    if not there:
        return None
    from matplotlib.figure import Figure

    def draw() -> Figure:
        figure = Figure(figsize=(WIDE, 0.9 + 0.38 * len(there)), layout="constrained")
        axes = figure.subplots()
        for place, (_, led, said) in enumerate(there):
            axes.plot([led.mean, said.mean], [place, place], color="#808080", linewidth=2, zorder=1)
            for cell, colour, marker, filled in ((led, "#0072B2", "o", True), (said, "#D55E00", "D", False)):
                axes.plot([cell.low, cell.high], [place, place], color=colour, alpha=0.35, linewidth=6, solid_capstyle="butt", zorder=2)
                face = colour if filled else "none"
                axes.plot(cell.mean, place, marker=marker, color=colour, markerfacecolor=face, markeredgewidth=2, zorder=3)
        axes.set_yticks(range(len(there)), [one.label for one, *_ in there])
        axes.set(xlim=(-3, 103), xlabel="per cent of the edits: ● led by the answer, ◇ written by itself", ylim=(len(there) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return figure

    return Picture(
        "Led by the hand, and speaking for itself",
        "For each method the share of edits that hold when the answer is given token by token, and when the model writes it by itself.",
        draw,
        ("method", "led", "written"),
        tuple((one.label, _with_limits(led), _with_limits(said)) for one, led, said in there),
    )


def over_edits(story: Story) -> Picture | None:
    """Efficacy, generality and specificity on top over the number of edits."""
    names = {"efficacy_top": "Efficacy", "generalization_top": "Generality", "specificity_top": "Specificity"}
    curves = {name: _with_bands(story, name) for name in names}
    if not any(curves.values()):
        return None

    def draw() -> Figure:
        figure, panels = _panels(len(names))
        handles: dict[str, Any] = {}
        looks = styles([one.label for one in story.lines])
        for axes, (name, title) in zip(panels, names.items(), strict=True):
            for label, curve in curves[name].items():
                handles[label] = line(axes, curve, *looks[label])
            axes.set_title(title)
            axes.set(ylim=(-3, 103), xlabel="edits")
        panels[0].set_ylabel("per cent, on top")
        legend_below(figure, handles)
        return figure

    rows = [
        (label, names[name], *(f"{x:g}: {mean:.1f}" for x, mean in zip(curve.x, curve.mean, strict=True)))
        for name, some in curves.items()
        for label, curve in some.items()
    ]
    return Picture(
        "As edits go on",
        "Share of the edits so far that hold, of their other wordings, and of answers about others that stay, after so many edits. "
        "Bands: the 95 % bootstrap interval over cases.",
        draw,
        *_table(("method", "measurement"), rows),
    )


def noise(story: Story) -> Picture | None:
    """Superimposed noise of the last edited layer (DeltaEdit, eq. 12 to 14) over the number of edits."""
    curves = {label: curve for label, curve in _curves(story, "noise").items() if any(curve.mean)}  # a single edit has no other ones
    if not curves:
        return None

    def draw() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDE, 3.2), layout="constrained")
        axes = figure.subplots()
        looks = styles([one.label for one in story.lines])
        handles = {label: line(axes, curve, *looks[label]) for label, curve in curves.items()}
        axes.set(xlabel="edits", ylabel="noise of the last edited layer")
        axes.grid(alpha=0.3)
        scale(axes, curves.values())
        legend_below(figure, handles)
        return figure

    rows = [
        (label, *(f"{x:g}: {mean:.3g}".replace("-", "−") for x, mean in zip(curve.x, curve.mean, strict=True)))
        for label, curve in curves.items()
    ]
    return Picture(
        "Superimposed noise",
        "What all other edits together do to an edit's own key, ‖Σ Δᵢ kₑ‖² − ‖Δₑ kₑ‖², in the mean (DeltaEdit, eq. 12 to 14).",
        draw,
        *_table(("method",), rows),
    )


def by_age(story: Story) -> Picture | None:
    """Retention: at the last checkpoint, efficacy of the edits by when they were made."""
    blocks: dict[str, Curve] = {}
    named: list[tuple[str, ...]] = []
    for one in story.lines:
        points: dict[tuple[int, int], list[float]] = {}
        for row in one.rows:
            for block in (row["metrics"].get("checkpoints") or [{}])[-1].get("by_age", []):
                if block.get("efficacy_top") is not None:
                    first, last = block["edits"]
                    points.setdefault((first, last), []).append(block["efficacy_top"])
        if len(points) > 1:
            curve = Curve.through({(first + last) / 2: values for (first, last), values in points.items()})
            blocks[one.label] = curve
            named.append((
                one.label, *(f"{first}–{last}: {mean:.1f}" for (first, last), mean in zip(sorted(points), curve.mean, strict=True)),
            ))  # fmt: skip
    if not blocks:
        return None

    def draw() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDE, 3.2), layout="constrained")
        axes = figure.subplots()
        looks = styles([one.label for one in story.lines])
        handles = {label: line(axes, curve, *looks[label]) for label, curve in blocks.items()}
        axes.set(xlabel="when the edit was made: the oldest on the left", ylabel="per cent that still hold", ylim=(-3, 103))
        axes.grid(alpha=0.3)
        legend_below(figure, handles)
        return figure

    return Picture(
        "Retention by age",
        "At the end of the sequence: the share of edits that still hold, by their place in it (the middle of each block of edits).",
        draw,
        *_table(("method",), named),
    )


def drifted(story: Story) -> Picture | None:
    """DeltaEdit's Figures 4b and 8: hidden states of other facts in the plane of t-SNE, of the first seed."""
    found = {line.label: some[0] for line in story.lines if (some := line.at_end("drift")) and some[0].get("points")}
    if not found:
        return None

    def draw() -> Figure:
        return clouds(found, columns=2, looks=styles([one.label for one in story.lines]))

    names = {"cosine": "mean cosine", "relative_l2": "relative L2", "cka": "CKA"}
    rows = [(label, *("–" if one[name] is None else f"{one[name]:.3f}" for name in names)) for label, one in found.items()]
    return Picture(
        "Where other facts lie, before and after",
        "Hidden states of prompts about other subjects in the plane of t-SNE, a panel a method: grey before the edits, coloured after "
        "them, with the marginal distributions and dashed 95 % ellipses. Each panel is a plane of its own: compare grey with colour, not "
        "panel with panel. t-SNE shows neighbourhoods and no distances: the numbers are the measure.",
        draw,
        ("method", *names.values()),
        tuple(rows),
    )


def perplexity(story: Story) -> Picture | None:
    """Perplexity as a multiple of the unedited model's, over the number of edits."""
    curves = _also(story, lambda found: {"": times([found["perplexity"]])[0]} if "perplexity" in found else {}, start=1.0).get("", {})
    return _one(
        story, curves, "times the unedited model's", "Perplexity as edits go on",
        "Perplexity of held-out text after so many edits, as a multiple of the unedited model's. Dashed: measured at the end "
        "only. Bands: from the lowest seed to the highest.",
        "{:.3f}",
    )  # fmt: skip


def drift(story: Story) -> Picture | None:
    """Relative L2 of other facts' states over the number of edits."""
    curves: dict[str, Curve] = {}
    for one in story.lines:
        points, ends = {0.0: [0.0]}, {0.0: [0.0, 0.0]}
        for edits, seeds in one.also.items():
            there = [found["drift"] for found in seeds if "drift" in found and found["drift"]["relative_l2"] is not None]
            if there:
                points[edits] = [found["relative_l2"] for found in there]
                ends[edits] = there[0]["intervals"]["relative_l2"] if len(there) == 1 else points[edits]
        if len(points) > 1:
            curve = Curve.through(points)
            curves[one.label] = replace(curve, low=[min(ends[x]) for x in curve.x], high=[max(ends[x]) for x in curve.x])
    return _one(
        story, curves, "relative L2 of other facts", "Drift as edits go on",
        "How far the hidden states of prompts about other subjects have moved after so many edits, in parts of their size. Dashed: "
        "measured at the end only. Bands: the 95 % bootstrap interval over prompts; of several seeds from the lowest to the highest.",
        "{:.3f}",
    )  # fmt: skip


def _one(story: Story, curves: Mapping[str, Curve], axis: str, title: str, about: str, spell: str) -> Picture | None:
    """A single panel with a line a method."""
    if not curves:
        return None

    def draw() -> Figure:
        figure, (axes,) = _panels(1)
        looks = styles([one.label for one in story.lines])
        handles = {label: line(axes, curve, *looks[label], dashed=len(curve.x) < 3) for label, curve in curves.items()}
        axes.set(xlabel="edits", ylabel=axis)
        scale(axes, curves.values())
        legend_below(figure, handles)
        return figure

    rows = [
        (label, *(f"{x:g}: {spell.format(mean)}" for x, mean in zip(curve.x, curve.mean, strict=True))) for label, curve in curves.items()
    ]
    return Picture(title, about, draw, *_table(("method",), rows))


def ability(story: Story) -> Picture | None:
    """DeltaEdit's Figures 3 and 7: the score of each task over the number of edits."""

    def scores(when: str) -> Callable[[Record], dict[str, float | None]]:
        return lambda found: {task: _score(one)[1] for task, one in found.get("ability", {}).get(when, {}).items()}

    curves = _also(story, scores("after"), before=scores("before"))
    if not curves:
        return None
    every = {
        task: one
        for some_line in story.lines for seeds in some_line.also.values() for found in seeds
        for task, one in found.get("ability", {}).get("after", {}).items()
    }  # fmt: skip
    metrics = {task: _score(one)[0] for task, one in every.items()}
    fewest = min(one.get("n") or 1.0 for one in every.values())

    def draw() -> Figure:
        figure, panels = _panels(min(len(curves), 3), -(-len(curves) // 3))
        looks = styles([one.label for one in story.lines])
        handles: dict[str, Any] = {}
        for axes, (task, some) in zip(panels, curves.items(), strict=False):
            for label, curve in some.items():
                handles[label] = line(axes, curve, *looks[label], dashed=len(curve.x) < 3)
            axes.set_title(f"{task}, {metrics[task]}")
            axes.set(ylim=(-3, 103), xlabel="edits")
        for spare in panels[len(curves) :]:
            spare.remove()
        panels[0].set_ylabel("per cent")
        legend_below(figure, handles)
        return figure

    rows = [
        (label, f"{task}, {metrics[task]}", *(f"{x:g}: {mean:.1f}" for x, mean in zip(curve.x, curve.mean, strict=True)))
        for task, some in curves.items()
        for label, curve in some.items()
    ]
    return Picture(
        "General ability as edits go on",
        "The score of each task after so many edits; at 0 the unedited model; dashed: measured at the end only. "
        f"{fewest:.0f} tests leave a score uncertain by up to ± {98 / math.sqrt(fewest):.0f} points; bands: from the lowest seed to the "
        "highest.",
        draw,
        *_table(("method", "task"), rows),
    )


def _score(scores: Mapping[str, float]) -> tuple[str, float]:
    """The paper's number of a task: F1; of a task of the harness's own its first."""
    names = [name for name in scores if name != "n"]
    name = "f1" if "f1" in names else names[0]
    return {"f1": "F1"}.get(name, name), scores[name]


def _also(
    story: Story,
    value: Callable[[Record], Mapping[str, float | None]],
    start: float | None = None,
    before: Callable[[Record], Mapping[str, float | None]] | None = None,
) -> dict[str, dict[str, Curve]]:
    """Panel -> label -> the curve of values that were measured beside the cases, from the unedited model on."""
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    for one in story.lines:
        for edits, seeds in one.also.items():
            for found in seeds:
                for name, measured in value(found).items():
                    if measured is None:
                        continue
                    own = points.setdefault(name, {}).setdefault(one.label, {})
                    own.setdefault(edits, []).append(measured)
                    first = start if before is None else before(found).get(name)
                    if first is not None:
                        own[0.0] = [first]
    return {name: {label: Curve.through(own) for label, own in some.items()} for name, some in points.items()}


def _with_bands(story: Story, name: str) -> dict[str, Curve]:
    """Label -> means over the cases of all seeds after so many edits, between the limits of their intervals; without empty ones."""
    curves = {}
    for one in story.lines:
        cells = {edits: cell for edits in one.marks if (cell := one.cell(name, edits)) is not None}
        if cells:
            some = cells.values()
            curves[one.label] = Curve([*cells], [cell.mean for cell in some], [cell.low for cell in some], [cell.high for cell in some])
    return curves


def _curves(story: Story, name: str) -> dict[str, Curve]:
    """Label -> the curve of a value over the checkpoints; without lines that have none."""
    curves = {}
    for one in story.lines:
        points: dict[float, list[float]] = {}
        for row in one.rows:
            for mark in row["metrics"].get("checkpoints") or ():
                if (found := mark.get(name)) is not None:
                    points.setdefault(mark["edits"], []).append(found)
        if points:
            curves[one.label] = Curve.through(points)
    return curves


def _panels(count: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDE, 1.0 + 2.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, count, sharey=True, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
    return figure, panels


def _svg(draw: Callable[[], Figure]) -> str:
    """The picture as an element of a page. Raises ImportError without matplotlib (`errata[plots]`)."""
    import matplotlib

    style: Any = {**STYLE, "svg.hashsalt": draw.__qualname__}
    with matplotlib.rc_context(style):  # names of its own for clips and markers
        file = io.StringIO()
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names that matplotlib gives in every picture, and nothing refers to
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("#000000", "currentColor")
    for colour, name in PAGE.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _with_limits(cell: Any) -> str:
    return f"{cell.mean:.1f} ({span(cell.low, cell.high)})"


def _table(first: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headings and rows of "x: value" cells: a column for each x, with a dash where a row has none there."""
    found = [dict(cell.split(": ", 1) for cell in row[len(first) :]) for row in rows]
    head = sorted({x for own in found for x in own}, key=lambda x: [float(part) for part in x.split("–")])  # "61–120": a block
    return (*first, *head), tuple((*row[: len(first)], *(own.get(x, "–") for x in head)) for row, own in zip(rows, found, strict=True))
