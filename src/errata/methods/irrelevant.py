"""Texts that have nothing to do with an edit, for editors that are trained to leave them alone (WISE)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.facts import Fact, read_jsonl
from errata.methods.locate.contexts import prefixes
from errata.statistics.corpus import beside, texts

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

_MOST = 2000
"""So many are read; an edit draws a few of them."""
_WORDS = 12
_WRITTEN, _LENGTH = 20, 10
"""Texts that the model writes where there are none, and their length in tokens."""


def irrelevant(lm: LanguageModel, source: str | Sequence[str] | None) -> tuple[str, ...]:
    """Prompts, never with their answer.

    source: the prompts themselves; a .json or .jsonl file of a data set, of which the locality prompts are taken (ZsRE's `loc`, KnowEdit's
        and errata's own `locality`); any text that `errata.statistics.corpus.texts` knows, of which the sentences are taken without their
        last word; or None: the text beside the weights, else what the unedited model writes.
    Raises ValueError where nothing is found, and what reading a file raises.
    """
    if source is None:
        source = str(found) if (found := beside(lm)) else tuple(_halved(prefixes(lm, _WRITTEN, _LENGTH)))
    if not isinstance(source, str):
        made = tuple(text for text in source if text.strip())
    elif source.endswith((".json", ".jsonl")) and (asked := tuple(islice(_locality(Path(source)), _MOST))):
        made = asked
    else:
        made = tuple(islice((piece for text in texts(source, lm) for piece in _sentences(text)), _MOST))
    if not made:
        raise ValueError(f"{source!r} holds no irrelevant prompts; give a text file, a data set with locality prompts, or the prompts")
    return made


def without(prompts: Sequence[str], facts: Sequence[Fact]) -> list[str]:
    """Those that speak of none of the subjects; all of them where every one does."""
    subjects = [fact.subject.lower() for fact in facts if fact.subject]
    return [prompt for prompt in prompts if not any(subject in prompt.lower() for subject in subjects)] or list(prompts)


def _locality(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        array = file.read(4096).lstrip().startswith("[")
    records: Any = json.loads(path.read_text(encoding="utf-8-sig")) if array else (record for _, record in read_jsonl(path))
    for record in records:
        if isinstance(record.get("loc"), str):
            yield record["loc"]
        groups = record.get("locality")
        for probe in (probe for group in (groups.values() if isinstance(groups, dict) else ()) for probe in group):
            prompt = probe.get("prompt") if isinstance(probe, dict) else None
            yield from [prompt] if isinstance(prompt, str) else prompt or []


def _sentences(text: str) -> Iterator[str]:
    """Each sentence or line of at least four words, at most so many and never the last of them: a question that asks for the next."""
    for piece in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])|\n", text):
        words = piece.split()
        if len(words) >= 4:
            yield " ".join(words[: min(len(words) - 1, _WORDS)])


def _halved(written: Sequence[str]) -> Iterator[str]:
    """Broken off half-way, since every one ends in a full stop."""
    for text in written:
        words = text.split()
        yield " ".join(words[: len(words) // 2 + 1])
