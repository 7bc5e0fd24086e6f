"""`errata report`: one page without a network that says what was edited, whether it worked, what it cost, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from errata.bench.paired import Paired
from errata.report import beside
from errata.report.board import Board, Shown, span
from errata.report.figures import Picture, pictures
from errata.report.story import COLUMNS, Cell, Column, Story, measured
from errata.report.tables import Sheet

MOST_NAMED = 8
"""So many edited facts are named at the top; all of them stand among the cases."""


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    bullets: Sequence[str] = ()
    sheets: Sequence[Board] = ()
    pictures: Sequence[Picture] = ()
    blocks: Sequence[Mapping[str, str]] = field(default_factory=tuple)


def page(story: Story) -> str:
    """The HTML of the report: one file, nothing fetched. Raises ImportError without matplotlib or jinja2 (`errata[plots]`)."""
    from jinja2 import Environment

    import errata

    drawn = pictures(story)
    shown = [column for column in story.columns if column.name not in ("efficacy_larger", "generalization_larger", "specificity_larger")]
    shown = [column for column in shown if column.name not in ("contains",)]
    data = {
        "columns": [column.name for column in shown],
        "cost": [column.name for column in shown if column.cost],
        "cases": story.cases,
    }
    home = resources.files("errata.report") / "assets"
    assets = {name: (home / f"report.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(assets["html"])
    return template.render(
        title=_title(story),
        subtitle=_subtitle(story),
        version=errata.__version__,
        css=assets["css"],
        js=assets["js"],
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),  # no </script> from a transcript
        parts=list(parts(story, drawn)),
        lines=[line.label for line in story.lines],
        case_columns=shown,
    )


def parts(story: Story, drawn: Mapping[str, Sequence[Picture]]) -> Iterator[Part]:
    """The sections in the order in which a reader asks."""
    yield _edited(story)
    led = [worked(story), *beside.asked_otherwise(story), *comparisons(story)]
    yield Part("worked", "Did it work?", (), _verdicts(story), led, drawn.get("worked", ()))
    paid = [cost(story), *beside.costs(story), *effort(story)]
    yield Part("cost", "What did it cost?", (), beside.told(story), paid, drawn.get("cost", ()))
    if drawn.get("goes-on"):
        yield Part("goes-on", "How does it go on with more edits?", (), (), (), drawn["goes-on"])
    about = "Each case under each method; open one to see what was written, and the answer token by token."
    yield Part("cases", "The single cases", [about], sheets=beside.case_study(story))
    yield _configuration(story)


def sheets(story: Story) -> list[Sheet]:
    """The page's tables, and the numbers of its curves, for Markdown and LaTeX."""
    curves = {"goes-on": pictures(story)["goes-on"]}  # the numbers of other pictures are those of tables
    made: list[Sheet] = []
    for part in parts(story, curves):
        made += [board.sheet() for board in part.sheets]
        made += [Sheet(picture.title, picture.headings, picture.rows) for picture in part.pictures]
    return made


def worked(story: Story) -> Board:
    """Reliability and generality when the model is led, beside what it writes by itself."""
    columns = [column for column in story.columns if not column.cost]
    return _board("Led, and written by itself", story, sorted(columns, key=lambda column: not column.led))


def _board(title: str, story: Story, columns: Sequence[Column]) -> Board:
    rows = [
        (Shown(line.label), Shown(str(line.n)), *(_measured(line.cell(column.name)) for column in columns), Shown(str(line.failed)))
        for line in story.lines
    ]
    failed = any(line.failed for line in story.lines)
    headings = ("method", "cases", *(column.title for column in columns), *(("not edited",) if failed else ()))
    return Board(
        title,
        headings,
        tuple(row if failed else row[:-1] for row in rows),
        frozenset(place + 2 for place, column in enumerate(columns) if not column.led),
        (
            "Per cent; below it the 95 % bootstrap interval over cases (Wilson's where all agree), and ± the standard deviation over seeds "
            "where there are several. " + " ".join(f"{column.title}: {column.about}." for column in columns),
        ),
    )


def comparisons(story: Story) -> list[Board]:
    """Each two methods on the same cases: is the one better, by how much, how sure."""
    made = []
    names = [name for name in ("exact", "reliability", "efficacy_top", "locality", "specificity_top") if name in COLUMNS]
    for column in (COLUMNS[name] for name in names):
        found = story.pairs(column.name)
        if not found:
            continue
        rows = tuple(
            (Shown(f"{one.label} {'over' if pair.difference else 'and'} {other.label}"), *_difference(pair)) for one, other, pair in found
        )
        headings = ("comparison", "points", "95 % interval", "how sure", "cases")
        made.append(Board(f"{column.title}: which is better, on the same cases?", headings, rows))
    return made


def _difference(pair: Paired) -> tuple[Shown, ...]:
    mood = "good" if pair.clear else ""
    share = "> 99.9 %" if pair.sure > 0.999 else f"{100 * pair.sure:.1f} %"  # of a thousand resamples
    sure = share if pair.clear else f"{share}, not settled" if pair.enough else "too few cases"
    points = f"+{pair.difference:.1f}" if pair.difference else "0.0"
    return Shown(points, mood=mood), Shown(span(pair.low, pair.high)), Shown(sure), Shown(str(pair.n))


def cost(story: Story) -> Board:
    """What should not have moved."""
    return _board("What should have stayed", story, [column for column in story.columns if column.cost])


def effort(story: Story) -> Iterator[Board]:
    """Seconds and memory."""
    rows = []
    for line in story.lines:
        seconds, memory = line.mean("seconds_per_edit"), line.mean("peak_memory_mb")
        rows.append((
            Shown(line.label), Shown("–" if seconds is None else f"{seconds:.2f}"), Shown("–" if memory is None else f"{memory:.0f}"),
        ))  # fmt: skip
    yield Board("Effort", ("method", "seconds an edit", "MB at the peak"), tuple(rows))


def _verdicts(story: Story) -> list[str]:
    """One sentence a method, without judgement: what it scores when led, what it writes, what stayed."""
    said = []
    for line in story.lines:
        led, written = line.cell("reliability") or line.cell("efficacy_top"), line.cell("exact")
        stayed = line.cell("locality") or line.cell("specificity_top")
        words = []
        if led:
            words.append(f"{led} % when the answer is led by the hand")
        if written:
            words.append(f"{written} % when the model writes by itself")
        text = f"{line.label}: " + (", ".join(words) if words else "nothing was measured")
        said.append(f"{text}; of what should stay, {stayed} % stayed." if stayed else f"{text}.")
    return said


def _edited(story: Story) -> Part:
    facts: dict[tuple[str, str], None] = {}
    for case in story.cases:
        for one in case["said"]:
            facts.setdefault((one["prompt"], one["answers"][0]), None)
    lines = [f"{prompt} → {answer}" for prompt, answer in facts]
    bullets = lines[:MOST_NAMED] + ([f"and {len(lines) - MOST_NAMED} more, all among the cases below"] if len(lines) > MOST_NAMED else [])
    paragraphs = []
    for run in story.runs:
        where, plan = run.results["environment"], run.plan
        seeds = ", ".join(map(str, plan["seeds"]))
        paragraphs.append(
            f"{run.name}: {_short(where['model'])} ({where['dtype']}), data {_short(where['data'])}, protocol {plan['protocol']}, "
            f"measured {measured(plan)}, seed{'s' if len(plan['seeds']) > 1 else ''} {seeds}; methods {', '.join(plan['methods'])}."
        )
    return Part("edited", "What was edited?", paragraphs, bullets)


def _configuration(story: Story) -> Part:
    blocks = []
    for run in story.runs:
        blocks.append({"title": f"{run.name}: plan.yaml", "text": run.text})
        blocks.append({"title": f"{run.name}: environment", "text": _yaml(run.results["environment"])})
    for line in story.lines:
        row = line.rows[0]
        told = {name: row[name] for name in ("settings", "weights_sha256", "diagnostics") if row.get(name)}
        if told:
            blocks.append({"title": f"{line.label}: settings", "text": _yaml(told)})
    return Part("configuration", "Exactly how", ["All that is needed to run it again."], blocks=blocks)


def _measured(cell: Cell | None) -> Shown:
    if cell is None:
        return Shown("–")
    deviation = "" if cell.deviation is None else f" ± {cell.deviation:.1f}"
    return Shown(f"{cell}{deviation}", span(cell.low, cell.high))


def _title(story: Story) -> str:
    models = dict.fromkeys(_short(run.results["environment"]["model"]) for run in story.runs)
    return f"Corrections of {', '.join(models)}"


def _subtitle(story: Story) -> str:
    data = dict.fromkeys(_short(run.results["environment"]["data"]) for run in story.runs)
    return f"{', '.join(data)} · {', '.join(dict.fromkeys(run.plan['protocol'] for run in story.runs))} · {len(story.lines)} methods"


def _short(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
