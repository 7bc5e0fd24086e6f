"""Requests: facts with what may be known about them, from JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from errata.edits.rows import LOCALITY
from errata.facts import EditCase, Fact, FactError, Probe, check_text, read_jsonl

REPHRASINGS = "rephrasings"
OPTIONAL = ("subject", "ground_truth", REPHRASINGS, LOCALITY)
"""Fields of a request that may be absent: one that is almost called so was meant to be it."""
NEAR = 0.7
"""As `difflib` measures: "rephrases" is nearer to "rephrasings", "loc_prompt" is not to "locality"."""


def request(number: int, fact: Fact, record: Mapping[str, Any] | None = None) -> EditCase:
    """One fact, and the `rephrasings` and `locality` prompts (lists of text) that its record brings, as a case.

    The answers of locality prompts are the model's own, so none are given. Fields of other names are passed over. Raises FactError where a
    list is none, or a name is misspelt.
    """
    absent = [name for name in OPTIONAL if name not in (record or ())]
    for name in record or ():
        if name not in OPTIONAL and (near := get_close_matches(name, absent, 1, NEAR)):
            raise FactError(f"there is no field {name!r}; did you mean {near[0]!r}?")
    lists = {name: (record or {}).get(name) or [] for name in (REPHRASINGS, LOCALITY)}
    for name, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise FactError(f"field {name!r} is no list of prompts (got {texts!r})")
        check_text(*texts)
    rephrasings = tuple(Probe(text, (fact.target,)) for text in lists[REPHRASINGS])
    return EditCase(str(number), (fact,), rephrasings, meta={LOCALITY: tuple(lists[LOCALITY])})


def read_requests(path: str | Path) -> list[EditCase]:
    """Requests from a JSONL file, one a line: prompt, subject, target, and lists of `rephrasings` and `locality` prompts if there are any.

    Raises FactError naming file and line of the first broken one, or an empty file.
    """
    found = []
    for number, record in read_jsonl(path):
        try:
            found.append(request(number, Fact.from_dict(record), record))
        except FactError as error:
            raise FactError(f"{path}, line {number}: {error}") from error
    if not found:
        raise FactError(f"{path} holds no facts; write one JSON object a line: prompt, subject, target")
    return found
