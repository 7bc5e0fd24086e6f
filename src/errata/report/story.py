"""What a report tells, as plain values: gathered from run folders, before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from errata.bench.folder import Record
from errata.bench.intervals import limits, resampled, wilson
from errata.bench.paired import Paired, paired
from errata.bench.plan import NO_OBJECTIVE
from errata.metrics.probability import COLUMNS as SEQUENCE
from errata.metrics.summary import KINDS, QUESTIONS

MOST_SHOWN = 120
"""Characters of a text that was written when an edit was asked for in other ways; all of it stands in the records."""
Case = tuple[int, str]
"""Seed and id of a case."""
Values = dict[str, dict[Case, float]]
"""Column -> case -> its value, a fraction."""


@dataclass(frozen=True)
class Column:
    """One measurement of a case. led: the right answer, or the old one, is given to the model token by token; else it writes by itself."""

    name: str
    title: str
    led: bool
    about: str
    cost: bool = False


COLUMNS = {
    column.name: column
    for column in (
        Column("reliability", "Reliability", True, "share of the new answer's tokens that are on top behind the edit's own prompt"),
        Column("generality", "Generality", True, "the same behind other wordings"),
        Column("portability", "Portability", True, "the same behind aliases and conclusions from the new fact"),
        Column("efficacy_top", "Efficacy", True, "all tokens of the new answer are on top behind the edit's own prompt"),
        Column("generalization_top", "Generality", True, "the same behind other wordings"),
        Column("efficacy_larger", "Efficacy, larger", True, "the new answer is likelier than the old one"),
        Column("generalization_larger", "Generality, larger", True, "the same behind other wordings"),
        Column("exact", "Written", False, "what the model writes by itself behind the edit's prompt is the new answer, and nothing else"),
        Column("contains", "Contained", False, "the new answer stands somewhere in what it writes"),
        Column("one_hop", "One hop", False, "questions about the new fact, answered in the model's own words"),
        Column("multi_hop", "Several hops", False, "questions that need the new fact, answered in the model's own words"),
        Column("locality", "Locality", True, "share of tokens that stay as the unedited model had them", cost=True),
        Column("specificity_top", "Specificity", True, "the unedited model's own answer about others is still on top", cost=True),
        Column("specificity_larger", "Specificity, larger", True, "it is still likelier than the new answer", cost=True),
    )
}


@dataclass(frozen=True)
class Cell:
    """A mean over cases in per cent, its 95 % bootstrap interval over them, and the standard deviation over seeds where there are some."""

    mean: float
    low: float
    high: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.1f}"


def cell_of(values: Mapping[Case, float] | None) -> Cell | None:
    """Of a column's values; None where nothing was measured."""
    if not values:
        return None
    low, high = limits(resampled([[value] for value in values.values()], 1)[:, 0])
    assert low is not None and high is not None
    if {*values.values()} in ({0.0}, {1.0}):  # of cases that all agree every resample is the same, and says nothing of others
        low, high = (100 * end for end in wilson(next(iter(values.values())), len(values)))
    seeds: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        seeds.setdefault(seed, []).append(100 * value)
    means = [fmean(own) for own in seeds.values()]
    return Cell(100 * fmean(values.values()), low, high, stdev(means) if len(means) > 1 else None)


@dataclass(frozen=True)
class Line:
    """One method of one run, over all of its seeds. rows: those of `results.json`; values: see `Values`, at the end; marks: the same after
    so many edits, at each checkpoint of a sequence at which the cases were measured. conditions: what two lines must have in common for
    their cases to be compared: data, model, protocol, and when they were measured.

    also: edits -> what was measured beside the cases, a seed each (see `errata.bench.also`); extended, unasked: what was written at the end
    when the edits were asked for in other ways, and what the unedited model had written.
    """

    label: str
    run: str
    conditions: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    values: Values
    marks: Mapping[int, Values]
    also: Mapping[int, tuple[Record, ...]] = field(default_factory=dict)
    extended: Values = field(default_factory=dict)
    unasked: Values = field(default_factory=dict)

    def at_end(self, name: str) -> list[Record]:
        """What was measured beside the cases under this name at the last checkpoint, a seed each; empty where nothing was."""
        last = self.also[max(self.also)] if self.also else ()
        return [found[name] for found in last if name in found]

    @property
    def n(self) -> int:
        """Measured cases, each seed's counted for itself."""
        return sum(row["n"] for row in self.rows)

    @property
    def failed(self) -> int:
        """Cases that could not be edited."""
        return sum(row["failed"] for row in self.rows)

    def cell(self, column: str, mark: int | None = None) -> Cell | None:
        """At the end, or after so many edits; None where nothing was measured."""
        return cell_of((self.values if mark is None else self.marks[mark]).get(column))

    def mean(self, name: str) -> float | None:
        """Of a number that the rows have, over the seeds."""
        found = [row[name] for row in self.rows if row.get(name) is not None]
        return fmean(found) if found else None


@dataclass(frozen=True)
class Run:
    """A finished run: name, plan (its YAML text too), `results.json`, and the records; known: what was edited about (seed, prompt)."""

    name: str
    plan: Mapping[str, Any]
    text: str
    results: Mapping[str, Any]
    records: Sequence[Record]
    known: Mapping[Case, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """All that a report says. lines: methods in the runs' order; columns: those that some line has; cases: one a case and line."""

    runs: tuple[Run, ...]
    lines: tuple[Line, ...]
    cases: tuple[dict[str, Any], ...]
    columns: tuple[Column, ...] = field(init=False)

    def __post_init__(self) -> None:
        there = tuple(column for column in COLUMNS.values() if any(line.values.get(column.name) for line in self.lines))
        object.__setattr__(self, "columns", there)

    @property
    def sequence(self) -> bool:
        """Whether some run is a sequence of edits."""
        return any(row["metrics"].get("checkpoints") for line in self.lines for row in line.rows)

    def pairs(self, column: str) -> list[tuple[Line, Line, Paired]]:
        """Each two lines, the better one first, on the cases that both have; none under different conditions."""
        made = []
        for i, one in enumerate(self.lines):
            for other in self.lines[i + 1 :]:
                found = paired(one.values.get(column, {}), other.values.get(column, {}))
                if found is None or one.conditions != other.conditions:
                    continue
                if found.difference < 0:
                    turned = paired(other.values[column], one.values[column])
                    assert turned is not None
                    made.append((other, one, turned))
                else:
                    made.append((one, other, found))
        return made


def story(runs: Sequence[Run]) -> Story:
    """Gather what the runs say. Names of runs are told apart by the caller."""
    made: list[Line] = []
    cases: list[dict[str, Any]] = []
    groups: dict[tuple[int, str, str], list[Mapping[str, Any]]] = {}
    for number, run in enumerate(runs):
        for row in run.results["rows"]:
            groups.setdefault((number, row["method"], row["objective"]), []).append(row)
    plain = {key: _plain(runs[key[0]], *key[1:]) for key in groups}
    different = len({_conditions(run) for run in runs}) > 1
    for (number, method, objective), rows in groups.items():
        run, label = runs[number], plain[number, method, objective]
        if different or list(plain.values()).count(label) > 1:
            label = f"{label} ({run.name})"
        told = list(_told(run, method, objective))
        also = _also(run, method, objective)
        asked = _asked_otherwise(also)
        end = [_shares(asked, when) for when in ("after", "before")]
        made.append(Line(label, run.name, _conditions(run), tuple(rows), _values(told), _marks(run, method, objective), also, *end))
        cases += [_case(label, seed, case, outcome, asked.get((seed, case), {})) for seed, case, outcome in told]
        cases += _unmade(run, method, objective, label)
    return Story(tuple(runs), tuple(made), tuple(cases))


def _plain(run: Run, method: str, objective: str) -> str:
    """A line's name within its run: with the objective where that says something."""
    objectives = {row["objective"] for row in run.results["rows"]} - {NO_OBJECTIVE}
    return method if objective == NO_OBJECTIVE or objectives == {"ce"} else f"{method} + {objective}"


def _conditions(run: Run) -> tuple[str, ...]:
    where, plan = run.results["environment"], run.plan
    return where["data_hash"], str(where.get("model_fingerprint") or where["model"]), plan["protocol"], measured(plan)


def measured(plan: Mapping[str, Any]) -> str:
    """When the cases were measured, in words."""
    return "after each edit" if plan["protocol"] == "single" else str(plan["measure"]).replace("-", " ")


def _unmade(run: Run, method: str, objective: str, label: str) -> Iterator[dict[str, Any]]:
    """The cases that could not be edited, with the reason."""
    for record in run.records:
        if (record["method"], record["objective"]) == (method, objective) and record.get("error"):
            for case in record.get("cases") or [record["case"]]:
                none: dict[str, Any] = {"values": {}, "said": [], "strips": [], "questions": []}
                yield {"line": label, "seed": record["seed"], "case": case, **none, "error": record["error"]}


def _told(run: Run, method: str, objective: str) -> Iterator[tuple[int, str, Record]]:
    """Seed, case and outcome of each measured case: in a sequence at the last checkpoint, or right after its own edit."""
    own = [record for record in run.records if (record["method"], record["objective"]) == (method, objective)]
    if all("case" in record for record in own):
        for record in own:
            if "reliability" in record:
                yield record["seed"], record["case"], record
        return
    last = {record["seed"]: record for record in own if "edits" in record and record.get("outcomes")}  # later ones take the place
    for seed in dict.fromkeys(record["seed"] for record in own):
        lines = [last[seed]] if seed in last else [record for record in own if record["seed"] == seed and "outcomes" in record]
        for line in lines:
            for case, outcome in line["outcomes"].items():
                yield seed, case, outcome


def _marks(run: Run, method: str, objective: str) -> dict[int, Values]:
    """Edits -> values, where a checkpoint has outcomes of its own."""
    found: dict[int, list[tuple[int, str, Record]]] = {}
    for record in run.records:
        if (record["method"], record["objective"]) == (method, objective) and "edits" in record:
            told = [(record["seed"], case, outcome) for case, outcome in record.get("outcomes", {}).items()]
            if told:
                found.setdefault(record["edits"], []).extend(told)
    return {edits: _values(told) for edits, told in sorted(found.items())}


def _also(run: Run, method: str, objective: str) -> dict[int, tuple[Record, ...]]:
    """Edits -> what was measured beside the cases, in the order of the seeds; each with its seed."""
    found: dict[int, list[Record]] = {}
    for record in run.records:
        if (record["method"], record["objective"]) == (method, objective) and record.get("also"):
            found.setdefault(record["edits"], []).append({**record["also"], "seed": record["seed"]})
    return {edits: tuple(some) for edits, some in sorted(found.items())}


def _asked_otherwise(also: Mapping[int, Sequence[Record]]) -> dict[Case, Record]:
    """Case -> what was written at the end when its edit was asked for in other ways, before and after."""
    last = also[max(also)] if also else ()
    return {(found["seed"], case): said for found in last for case, said in found.get("extended", {}).items()}


def _shares(asked: Mapping[Case, Record], when: str) -> Values:
    found: Values = {}
    for case, said in asked.items():
        for name, value in said[when].items():
            if isinstance(value, int | float):
                found.setdefault(name, {})[case] = float(value)
    return found


def _values(told: Sequence[tuple[int, str, Record]]) -> Values:
    found: Values = {}
    for seed, case, outcome in told:
        for name, value in _scores(outcome).items():
            found.setdefault(name, {})[seed, case] = value
    return found


def _scores(outcome: Record) -> dict[str, float]:
    """What was measured of a case, as fractions, by the names of COLUMNS."""
    asked = outcome.get("questions") or {}
    scores = {name: outcome.get(name) for name in (*KINDS, *SEQUENCE)} | {name: asked.get(name) for name in QUESTIONS}
    scores |= {name: _said(outcome, name) for name in ("exact", "contains")}
    return {name: float(value) for name, value in scores.items() if value is not None}


def _said(outcome: Record, what: str) -> float | None:
    """Share of the edit prompts behind which the model wrote the answer."""
    transcripts = _transcripts(outcome)
    if transcripts:
        return fmean(said[what] for said in transcripts)
    written = outcome.get("generation")
    return written if what == "exact" and isinstance(written, int | float) else None  # runs of before transcripts were kept


def _transcripts(outcome: Record) -> list[dict[str, Any]]:
    written = outcome.get("generation")
    found: list[dict[str, Any]] = written.get("transcripts", []) if isinstance(written, Mapping) else outcome.get("transcripts", [])
    return found


def _case(label: str, seed: int, case: str, outcome: Record, asked_otherwise: Record) -> dict[str, Any]:
    """What is shown of one case, JSON-ready; short names, since there are thousands."""
    return {
        "line": label,
        "seed": seed,
        "case": case,
        "values": {name: round(value, 4) for name, value in _scores(outcome).items()},
        "said": [{"prompt": said["prompt"], "answers": said["answers"], "text": said["text"]} for said in _transcripts(outcome)],
        "strips": outcome.get("strips", []),
        "questions": [
            {"prompt": reply["prompt"], "answers": asked["answers"], "text": reply["text"]}
            for asked in (outcome.get("questions") or {}).get("asked", [])
            for reply in asked["replies"]
        ],
        **({"ways": ways} if (ways := list(_ways(asked_otherwise))) else {}),
    }


def _ways(asked: Record) -> Iterator[list[str]]:
    """Way, prompt, new answer, and the beginning of what was written; not the prompt as it stands, which is told already."""
    for way, replies in asked.get("after", {}).get("transcripts", {}).items():
        if way != "plain":
            yield from ([way, said["prompt"], said["target"], _beginning(said["text"])] for said in replies)


def _beginning(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
