"""From records to the numbers of a table. Knows no model; reads what the scores' `to_dict` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

KINDS = ("reliability", "generality", "portability", "locality")
"""The reported columns, in the order of OVERTONE's tables."""

QUESTIONS = ("one_hop", "multi_hop")
"""Columns beside them where the cases have questions (OVERTONE's Table 2)."""


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Percentages over records `{**CaseScore.to_dict(), "generation": GenerationScore.to_dict(), "questions": MultiHopScore.to_dict()}`
    (generation and questions may be missing).

    reliability, generality, portability, locality: mean over the records that have the key (each is already the mean over its
        groups' means). None for a column without data.
    one_hop, multi_hop and what else `MultiHopScore.metrics` has: only if some record has questions.
    average: mean of the columns that have data (EVALUATION §1: so ZsRE has four, Wiki_recent three, WikiBio two, and MQuAKE
        reliability, one_hop and multi_hop).
    <column>_flat: mean over all probes of all records instead, since published tables differ.
    generation, generation_contains: exact match, and the answer is contained.
    """
    columns = {kind: _percent([record[kind] for record in records if record.get(kind) is not None]) for kind in KINDS}
    asked = _questions(records)
    there = [value for value in (*columns.values(), *(asked.get(name) for name in QUESTIONS)) if value is not None]
    written = [record["generation"] for record in records if record.get("generation")]
    return {
        **columns,
        "average": fmean(there) if there else None,
        **{f"{kind}_flat": _percent([value for record in records for value in _probes(record, kind)]) for kind in KINDS},
        "generation": _percent([one["exact"] for one in written]),
        "generation_contains": _percent([one["contains"] for one in written]),
        **asked,
    }


def _questions(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Share of each kind of question, over the records that have it; nothing without questions."""
    asked = [record["questions"] for record in records if record.get("questions")]
    kinds = {name for one in asked for name in one if name.startswith(("one_hop", "multi_hop", "hops_"))}
    return {name: _percent([one[name] for one in asked if name in one]) for name in (*QUESTIONS, *sorted(kinds - {*QUESTIONS})) if asked}


def _probes(record: Mapping[str, Any], kind: str) -> list[float]:
    return [value for values in record.get("probes", {}).get(kind, {}).values() for value in values]


def _percent(values: Sequence[float]) -> float | None:
    return 100 * fmean(values) if values else None
