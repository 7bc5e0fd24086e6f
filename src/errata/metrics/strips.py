"""Token strips: how likely a model finds each token of the right answer, led by the answer itself, and what it would say in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.facts import EditCase
from errata.lm import LanguageModel
from errata.metrics.teacher_forced import Prediction, predict

Strip = dict[str, list[Any]]
"""Of one answer, JSON-ready. tokens: its tokens as text; p: the probability of each behind the ones before, three decimals; top: the
text of the likeliest token at each place, which is the token itself where the model is right."""


def strips(lm: LanguageModel, cases: Sequence[EditCase]) -> list[list[Strip]]:
    """For each case the strips of its edit prompts, under the model as it is. Raises ModelError for a text that is too long for it."""
    found = iter(predict(lm, [(fact.text, fact.target) for case in cases for fact in case.facts]))
    return [[strip(lm.tokenizer, next(found)) for _ in case.facts] for case in cases]


def strip(tokenizer: Any, answer: Prediction) -> Strip:
    """What was predicted for one answer, as a strip."""
    return {
        "tokens": [tokenizer.decode([token]) for token in answer.wanted],
        "p": [round(p, 3) for p in answer.p],
        "top": [tokenizer.decode([token]) for token in answer.given],
    }
