"""MQuAKE (Zhong et al. 2023, arXiv:2305.14795): what follows from an edit, several hops away. CF, CF-3k, T, and the cleaned sets of Wang et
al. 2024 (MQuAKE-2002, MQuAKE-hard) have the same fields.

`requested_rewrite` is a list of edits that belong together. `new_single_hops` is the way from the subject to the answer after them, fact
by fact (`question, answer, answer_alias`), and `questions` asks over the whole way, in several wordings, for `new_answer` or one of
`new_answer_alias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data.fields import Record
from errata.facts import EditCase, Fact, Question


def recognises(record: Mapping[str, Any]) -> bool:
    """Is this a list of edits with questions (CounterFact has one edit, not in a list)?"""
    return isinstance(record.get("requested_rewrite"), list)


def cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record. Raises DataError naming the field of a broken one."""
    for record in records:
        rewrites = [record.inside(f"requested_rewrite[{i}]", item) for i, item in enumerate(_list(record, "requested_rewrite"))]
        facts = tuple(rewrite.fact(truth=("target_true", "ground_truth")) for rewrite in rewrites)
        asked = {text.strip() for rewrite in rewrites if isinstance(text := rewrite.raw.get("question"), str)}
        hops = [record.inside(f"new_single_hops[{i}]", item) for i, item in enumerate(_list(record, "new_single_hops"))]
        questions = [*(_hop(hop, facts, asked) for hop in hops), _whole(record, len(hops))]
        relations = [rewrite.raw.get("relation_id") for rewrite in rewrites]
        yield EditCase(record.id, facts, meta=record.meta(relations=relations if any(relations) else None), questions=tuple(questions))


def _hop(hop: Record, facts: Sequence[Fact], asked: set[str]) -> Question:
    """One fact on the way, asked for directly: an edited one if an edit has the same question, or the same words before its target."""
    question = hop.text("question")
    edited = question in asked or hop.raw.get("cloze") in {fact.text for fact in facts}
    return Question((question,), _answers(hop, "answer"), hops=1, edited=edited)


def _whole(record: Record, hops: int) -> Question:
    wordings = [record.as_text(item, f"questions[{i}]") for i, item in enumerate(_list(record, "questions"))]
    return Question(tuple(wordings), _answers(record, "new_answer"), hops)


def _answers(record: Record, field: str) -> tuple[str, ...]:
    """The answer, then its aliases."""
    answers = record.as_answers(record.raw.get(field), field)
    if not answers:
        raise record.error(field, "is missing or empty; a question needs its answer after the edit")
    return tuple(dict.fromkeys((*answers, *record.as_answers(record.raw.get(f"{field}_alias"), f"{field}_alias"))))


def _list(record: Record, field: str) -> list[Any]:
    value = record.raw.get(field)
    if not isinstance(value, list) or not value:
        got = "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
        raise record.error(field, f"expected a list with at least one entry, got {got}")
    return value
