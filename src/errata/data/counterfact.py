"""CounterFact (Meng et al. 2022): the original nested form, and the flat form of the editing toolkits.

Nested: `requested_rewrite{prompt with {}, subject, target_new.str, target_true.str}`, `paraphrase_prompts`, `neighborhood_prompts`.
Flat: `prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth`, one neighbour a record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from errata.data.fields import Record
from errata.facts import EditCase, Probe

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
    """One case a record, its neighbourhood pooled over *all* records given (whatever number of cases is taken afterwards)."""
    pools = pool_neighbours(records)
    for record in records:
        case = record.case(record.fact(), flat_locality="neighbourhood")
        fact = case.facts[0]
        pool = pools.get((_template(fact.prompt, fact.subject), fact.ground_truth or ""), {})
        own = case.locality["neighbourhood"][0].prompt if "neighbourhood" in case.locality else ""
        yield replace(case, neighbourhood=_pick(pool, record.number, own, fact.subject, fact.ground_truth))


def pool_neighbours(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, int]]:
    """Locality prompts by (template of the record's edit prompt, answer): prompt -> number of the first record that has it.

    Records that lack one of the fields add nothing here; reading them as a case says what is wrong.
    """
    pools: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for record in records:
        fields = [record.raw.get(name) for name in ("prompt", "subject", "locality_prompt", "locality_ground_truth")]
        if all(isinstance(value, str) and value.strip() for value in fields):
            prompt, subject, neighbour, answer = (str(value).strip() for value in fields)
            pools[_template(prompt, subject), answer].setdefault(neighbour, record.number)
    return pools


def _template(prompt: str, subject: str) -> str:
    return prompt.replace(subject, "{}", 1) if subject else prompt


def _pick(pool: Mapping[str, int], number: int, own: str, subject: str, truth: str | None) -> tuple[Probe, ...]:
    """Up to ten of the pool that do not speak of `subject`: the record's `own` neighbour, then those that follow it in the file.

    After the file's end comes its start. Going round from the record, instead of from the start of the pool, keeps a large pool's first
    ten from standing for all of it.
    """
    if truth is None:
        return ()
    about = subject.casefold()
    allowed = [(prompt, place) for prompt, place in pool.items() if not about or about not in prompt.casefold()]
    others = sorted((prompt != own, place < number, place, prompt) for prompt, place in allowed)
    return tuple(Probe(prompt, (truth,)) for *_, prompt in others[:NEIGHBOURS])
