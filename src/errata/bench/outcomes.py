"""What a model scores on cases: the part of a line that every protocol of single cases shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.bench.folder import Record
from errata.facts import EditCase
from errata.metrics import generation, teacher_forced

if TYPE_CHECKING:
    from errata.lm import LanguageModel


def outcomes(lm: LanguageModel, cases: Sequence[EditCase], before: Mapping[str, teacher_forced.Tokens] | None) -> list[Record]:
    """For each case what `errata.metrics.summarise` reads: accuracies, their probes, and what the model, as it is, writes.

    before: see `teacher_forced.score_all`.
    """
    scores, written = teacher_forced.score_all(lm, cases, before), generation.score_all(lm, cases)
    records = [score.to_dict() | {"generation": said.to_dict()} for score, said in zip(scores, written, strict=True)]
    return [{name: value for name, value in record.items() if name != "id"} for record in records]
