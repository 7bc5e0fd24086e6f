"""Prompts of facts that nobody edits, to see what moves elsewhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from errata.data import ENVIRONMENT, _records
from errata.facts import EditCase

KNOWN = "known_1000.json"
"""Facts that GPT-2 XL knows (Meng et al. 2022, ROME): an array of records with `prompt` and `subject`."""
LIMIT = 1000


class Prompts(NamedTuple):
    """source: where they are from, in words."""

    texts: tuple[str, ...]
    source: str


def factual(data: str | Path, cases: Sequence[EditCase], limit: int = LIMIT, data_dir: str | Path | None = None, seed: int = 0) -> Prompts:
    """Up to `limit` different prompts, drawn at random with the seed, each to be continued by a fact that none of the cases edits.

    data: the data set that `cases` are from. "atlas": statements of its world, which is all that its model knows. Another: the prompts of
    `known_1000.json`, looked for in `data_dir` (or $ERRATA_DATA) and two levels below, without the cases' subjects; where it is not there,
    what the cases themselves ask elsewhere (locality and neighbourhood).

    Raises DataError for a file that is not of that form, and ValueError where there is not one prompt.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; take at least one prompt")
    found, source = _found(data, cases, data_dir)
    texts = sorted(set(found))
    if not texts:
        raise ValueError(f"there is no prompt beside what is edited in {data}; give the folder that holds {KNOWN} (--data-dir)")
    random.Random(seed).shuffle(texts)
    return Prompts(tuple(texts[:limit]), source)


def _found(data: str | Path, cases: Sequence[EditCase], data_dir: str | Path | None) -> tuple[Iterable[str], str]:
    if str(data) == "atlas":
        return _of_atlas(cases), "atlas"
    folder = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT)
    places = (place for level in ("", "*/", "*/*/") for place in sorted(Path(folder).glob(level + KNOWN))) if folder is not None else ()
    if path := next((place for place in places if place.is_file()), None):
        edited = {fact.subject.casefold() for case in cases for fact in case.facts}
        records = _records(path)
        return [text for r in records if (text := r.text("prompt")) and r.text("subject").casefold() not in edited], KNOWN
    facts = {fact.text for case in cases for fact in case.facts}
    groups = (group for case in cases for group in (*case.locality.values(), case.neighbourhood))
    return [probe.prompt for group in groups for probe in group if probe.prompt not in facts], "locality and neighbourhood of the cases"


def _of_atlas(cases: Sequence[EditCase]) -> list[str]:
    from errata.data.atlas import questions
    from errata.data.atlas.world import build

    world = build()
    edited = {(fact.subject, case.meta.get("relation")) for case in cases for fact in case.facts}
    asked = zip(world.statements, questions("seen", world), strict=True)
    return [question.prompt for statement, question in asked if statement not in edited]
