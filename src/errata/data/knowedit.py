"""KnowEdit (Zhang et al. 2024, arXiv:2401.01286): ZsRE, Wiki_recent, Wiki_counterfact, and WikiBio.

Records hold `subject, prompt, target_new`, mostly `ground_truth` and a rephrasing, and groups of probes under `portability`
(Subject_Aliasing, Reasoning, Logical_Generalization) and `locality` (Relation_Specificity, Forgetfulness). WikiBio has a passage
(`text`) that is to be continued by the true next sentence (`labels`), about `concept`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data.fields import TARGETS, Record
from errata.facts import EditCase


def recognises(record: Mapping[str, Any]) -> bool:
    """Is this a prompt with a new answer?"""
    return "prompt" in record and any(name in record for name in TARGETS)


def cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record. Raises DataError naming the field of a broken one."""
    for record in records:
        yield record.case(record.fact())


def recognises_wikibio(record: Mapping[str, Any]) -> bool:
    """Is this a passage with its next sentence?"""
    return "text" in record and "labels" in record


def wikibio_cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record: prompt = the passage, target = the sentence that should follow, subject = the person."""
    for record in records:
        fact = record.fact(prompt=("text",), target=("labels",))
        if "concept" in record.raw:
            fact = record.checked_fact(fact.prompt, record.text("concept"), fact.target, fact.ground_truth)
        yield record.case(fact)
