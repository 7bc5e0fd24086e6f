"""errata's own cases: what `EditCase.to_dict` writes, one JSON object a line.

A line that is only a fact (`{"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}`) is read too, by `knowedit`,
whose fields are the same words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data.fields import Record
from errata.facts import EditCase, FactError, Question


def recognises(record: Mapping[str, Any]) -> bool:
    """Is this a case with its facts?"""
    return "facts" in record


def cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record. Raises DataError naming the field of a broken one."""
    for record in records:
        items = record.raw.get("facts")
        if not isinstance(items, list) or not items:
            raise record.error("facts", "expected a list of at least one fact (prompt, subject, target)")
        facts = tuple(record.inside(f"facts[{index}]", item).fact() for index, item in enumerate(items))
        meta = record.raw.get("meta") or {}
        if not isinstance(meta, Mapping):
            raise record.error("meta", f"expected a JSON object, got {type(meta).__name__}")
        parts = (
            record.rephrases(facts[0].target),
            record.groups("portability"),
            record.groups("locality"),
            record.probes(record.raw.get("neighbourhood"), "neighbourhood"),
        )
        yield EditCase(record.id, facts, *parts, meta=dict(meta) | record.meta(), questions=_questions(record))


def _questions(record: Record) -> tuple[Question, ...]:
    items = record.raw.get("questions") or []
    if not isinstance(items, list):
        raise record.error("questions", f"expected a list of questions (wordings, answers, hops), got {type(items).__name__}")
    made = []
    for index, item in enumerate(items):
        place = f"questions[{index}]"
        inner = record.inside(place, item)
        hops, edited = inner.raw.get("hops", 1), inner.raw.get("edited", True)
        if type(hops) is not int or type(edited) is not bool:
            raise record.error(place, f"expected hops as a whole number and edited as true or false, got {hops!r} and {edited!r}")
        wordings, answers = (inner.as_answers(inner.raw.get(name), name) for name in ("wordings", "answers"))
        try:
            made.append(Question(wordings, answers, hops, edited))
        except FactError as error:
            raise record.error(place, str(error)) from error
    return tuple(made)


def write(path: str | Path, cases: Iterable[EditCase]) -> None:
    """Write cases, one a line, in UTF-8; `data.load` reads them back."""
    with open(path, "w", encoding="utf-8") as lines:
        for case in cases:
            lines.write(json.dumps(case.to_dict(), ensure_ascii=False) + "\n")
