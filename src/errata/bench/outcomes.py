"""What a model scores on cases: the part of a line that every protocol of single cases shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.bench.folder import Record
from errata.facts import EditCase
from errata.metrics import generation, multihop, teacher_forced
from errata.metrics.strips import strip

if TYPE_CHECKING:
    from errata.lm import LanguageModel
    from errata.lm.own import Within
    from errata.lm.resume import Below


def outcomes(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    before: Mapping[str, teacher_forced.Tokens] | None,
    seed: int = 0,
    batch_size: int = teacher_forced.BATCH_SIZE,
    within: Within | None = None,
    below: Below | None = None,
) -> list[Record]:
    """For each case what `errata.metrics.summarise` reads: accuracies, their probes, what the model, as it is, writes; and the strips.

    before, within, below: see `teacher_forced.score_all`. seed: of the replies to questions, which are sampled; cases without questions
    have none, and `within` is not for those that have. Raises ModelError for a text that is too long for the model.
    """
    records = []
    scores = teacher_forced.score_all(lm, cases, before, batch_size, within, below)
    for score, said in zip(scores, generation.score_all(lm, cases, batch_size=batch_size, within=within), strict=True):
        record = score.to_dict() | {"generation": said.to_dict(), "strips": [strip(lm.tokenizer, edit) for edit in score.edits]}
        del record["id"]
        records.append(record)
    with_questions = [(case, record) for case, record in zip(cases, records, strict=True) if case.questions]
    if with_questions:
        replies = multihop.score_all(lm, [case for case, _ in with_questions], seed)
        for (_, record), replied in zip(with_questions, replies, strict=True):
            record["questions"] = replied.to_dict()
    return records
