"""CounterFact (Meng et al. 2022): the original nested form, and the flat form of the editing toolkits.

Nested: `requested_rewrite{prompt with {}, subject, target_new.str, target_true.str}`, `paraphrase_prompts`, `neighborhood_prompts`.
Flat: `prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth`, one neighbour a record.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.data.fields import Record
from errata.facts import SLOT, EditCase, Probe

NEIGHBOURS = 10
"""Neighbourhood prompts a case, as in the original data set."""


def recognises_nested(record: Mapping[str, Any]) -> bool:
    """Is this the form with one `requested_rewrite` (MQuAKE has a list of them)?"""
    return isinstance(record.get("requested_rewrite"), Mapping)


def nested_cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record; the neighbours serve both as neighbourhood and as the locality group of that name."""
    for record in records:
        rewrite = record.inside("requested_rewrite", record.raw.get("requested_rewrite"))
        fact = rewrite.fact(truth=("target_true", "ground_truth"))
        neighbourhood = _neighbours(record, fact.ground_truth)
        yield EditCase(
            record.id,
            (fact,),
            record.rephrases(fact.target),
            record.groups("portability"),
            {"neighbourhood": neighbourhood} if neighbourhood else {},
            neighbourhood,
            record.meta(relation=rewrite.raw.get("relation_id"), generation_prompts=record.raw.get("generation_prompts")),
        )


def _neighbours(record: Record, truth: str | None) -> tuple[Probe, ...]:
    field, prompts = record.first(("neighborhood_prompts", "neighbourhood_prompts"))
    if prompts is None:
        return ()
    if not isinstance(prompts, list):
        raise record.error(field, f"expected a list of prompts, got {type(prompts).__name__}")
    if prompts and truth is None:
        raise record.error("requested_rewrite.target_true", "is missing; it is the answer of the neighbourhood prompts")
    return tuple(probe for index, prompt in enumerate(prompts) for probe in record.probe(prompt, truth, f"{field}[{index}]", field))


def recognises_flat(record: Mapping[str, Any]) -> bool:
    """Is this an edit with its neighbour in flat fields?"""
    return "prompt" in record and "target_new" in record and "locality_prompt" in record


def flat_cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record, its neighbourhood pooled over *all* records given (whatever number of cases is taken afterwards).

    The form does not name relations, but a record's edit prompt and its locality prompt ask about the same one, in two wordings
    (templates). So a neighbour is the locality prompt of a record with the same old answer and one of these two wordings. It is not
    followed any further: what two records share with a third may be a wording of several relations ("{}, from").
    """
    rows = [_Row.of(record) for record in records]
    wordings = _Wordings(row.template for row in rows if row)
    pools: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # (template, answer) -> neighbour -> number of its first record
    for record, row in zip(records, rows, strict=True):
        for template in wordings.of(row):
            pools[template, row.answer].setdefault(row.neighbour, record.number)  # type: ignore[union-attr]  # no row, no wordings
    for record, row in zip(records, rows, strict=True):
        case = record.case(record.fact(), flat_locality="neighbourhood")
        fact = case.facts[0]
        pool: dict[str, int] = {}
        for template in wordings.of(row) or (_template(fact.prompt, fact.subject),):
            pool = pools.get((template, fact.ground_truth or ""), {}) | pool
        own = row.neighbour if row else ""
        yield replace(case, neighbourhood=_pick(pool, record.number, own, fact.subject, fact.ground_truth))


@dataclass(frozen=True, slots=True)
class _Row:
    """What pooling needs of a record: the template of its edit prompt, its locality prompt and that one's answer."""

    template: str
    neighbour: str
    answer: str

    @classmethod
    def of(cls, record: Record) -> _Row | None:
        """None where one of the fields is missing: it adds nothing to the pools, and reading it as a case says what is wrong."""
        fields = [record.raw.get(name) for name in ("prompt", "subject", "locality_prompt", "locality_ground_truth")]
        if not all(isinstance(value, str) and value.strip() for value in fields):
            return None
        prompt, subject, neighbour, answer = (str(value).strip() for value in fields)
        return cls(_template(prompt, subject), neighbour, answer)


class _Wordings:
    """The templates of a file's edit prompts, and which of them a locality prompt, whose subject is not given, is worded in."""

    def __init__(self, templates: Iterable[str]) -> None:
        self._by_last_word: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for template in sorted(set(templates), key=lambda template: (-len(template), template)):  # the longest that fits says most
            before, slot, after = template.partition(SLOT)
            if slot and after.strip():
                self._by_last_word[_last_word(after)].append((before, after, template))

    def of(self, row: _Row | None) -> tuple[str, ...]:
        """The record's one or two templates: of its edit prompt, and of its locality prompt where it is one of the file's."""
        if row is None:
            return ()
        text = row.neighbour
        for before, after, template in self._by_last_word.get(_last_word(text), ()):
            if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
                return tuple(dict.fromkeys((row.template, template)))
        return (row.template,)


def _template(prompt: str, subject: str) -> str:
    return prompt.replace(subject, SLOT, 1) if subject else prompt


def _last_word(text: str) -> str:
    return text.split()[-1]


def _pick(pool: Mapping[str, int], number: int, own: str, subject: str, truth: str | None) -> tuple[Probe, ...]:
    """Up to ten of the pool that do not speak of `subject`: the record's `own` neighbour, then those that follow it in the file.

    After the file's end comes its start. Going round from the record, instead of from the start of the pool, keeps a large pool's first
    ten from standing for all of it.
    """
    if truth is None:
        return ()
    allowed = [(prompt, place) for prompt, place in pool.items() if not _speaks_of(prompt, subject)]
    others = sorted((prompt != own, place < number, place, prompt) for prompt, place in allowed)
    return tuple(Probe(prompt, (truth,)) for *_, prompt in others[:NEIGHBOURS])


def _speaks_of(prompt: str, subject: str) -> bool:
    """Does the subject stand in the prompt, in whole words? Kingdom of Egypt speaks of Egypt, Plaza de Europa not of the euro."""
    about, text = subject.casefold(), prompt.casefold()
    return bool(about) and about in text and re.search(rf"(?<!\w){re.escape(about)}(?!\w)", text) is not None
