"""What a model scores on cases: the part of a line that every protocol of single cases shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.bench.folder import Record
from errata.facts import EditCase
from errata.metrics import generation, multihop, teacher_forced
from errata.metrics.strips import strips

if TYPE_CHECKING:
    from errata.lm import LanguageModel


def outcomes(
    lm: LanguageModel, cases: Sequence[EditCase], before: Mapping[str, teacher_forced.Tokens] | None, seed: int = 0
) -> list[Record]:
    """For each case what `errata.metrics.summarise` reads: accuracies, their probes, what the model, as it is, writes; and the strips.

    before: see `teacher_forced.score_all`. seed: of the replies to questions, which are sampled; cases without questions have none.
    Raises ModelError for a text that is too long for the model.
    """
    records = [score.to_dict() for score in teacher_forced.score_all(lm, cases, before)]
    for record, said, strip in zip(records, generation.score_all(lm, cases), strips(lm, cases), strict=True):
        record |= {"generation": said.to_dict(), "strips": strip}
        del record["id"]
    with_questions = [(case, record) for case, record in zip(cases, records, strict=True) if case.questions]
    if with_questions:
        replies = multihop.score_all(lm, [case for case, _ in with_questions], seed)
        for (_, record), replied in zip(with_questions, replies, strict=True):
            record["questions"] = replied.to_dict()
    return records
