from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from errata.metrics import generation, summarise

CASES = [
    EditCase("right", (Fact("The capital of {} is", "France", "paris"),)),
    EditCase("goes on", (Fact("Ada Byron lives in", "", "London"),)),
    EditCase("half", (Fact("The capital of Norway is", "", "Oslo"), Fact("Bo Ek lives in", "", "Paris"))),
]


def alone(lm: LanguageModel, prompt: str, limit: int) -> str:
    """Greedy decoding as defined: one prompt, one token at a time, no cache."""
    ids = lm.tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < start + limit:
        token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([token]):
            break
        ids.append(token)
    return str(lm.tokenizer.decode(ids[start:]))


def test_what_the_model_writes_by_itself(lm: LanguageModel) -> None:
    scores = generation.score_all(lm, CASES, max_new_tokens=12)
    for case, score in zip(CASES, scores, strict=True):
        assert [one.text for one in score.transcripts] == [alone(lm, fact.text, 12) for fact in case.facts]
        assert generation.score(lm, case, max_new_tokens=12) == score
    assert [(score.exact, score.contains) for score in scores] == [(1.0, 1.0), (0.0, 1.0), (0.5, 0.5)]
    records = [json.loads(json.dumps({"id": score.id, "generation": score.to_dict()})) for score in scores]
    assert records[0]["generation"]["transcripts"][0] == {
        "prompt": "The capital of France is", "answers": ["paris"], "text": " Paris.", "exact": True, "contains": True,
    }  # fmt: skip
    summary = summarise(records)
    assert summary["generation"] == 50.0 and summary["generation_contains"] == pytest.approx(250 / 3)
    assert summary["average"] is None and summary["reliability"] is None  # nothing teacher-forced was measured


class Scripted:
    """Answers from a script; remembers the limits it was given."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]) -> None:
        self.tokenizer, self.answers, self.limits = tokenizer, answers, dict[str, int]()

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop_at_newline: bool = True, **_: Any) -> list[str]:
        assert stop_at_newline
        self.limits |= dict.fromkeys(prompts, max_new_tokens)
        return [self.answers[prompt] for prompt in prompts]


def test_an_answer_is_never_cut_to_the_targets_length_nor_out_of_reach(lm: LanguageModel) -> None:
    long = "a writer of programs who lives in London, an old town on a river, and works in the morning"
    model = Scripted(lm.tokenizer, {"A is": " Paris. The", "B is": long + ".", "C is": " Roma"})
    probes = [Probe("A is", ("Paris",)), Probe("B is", (long,)), Probe("C is", ("Rome", "Roma"))]
    written = generation.ask(model, probes, max_new_tokens=8)  # type: ignore[arg-type]
    assert [(one.exact, one.contains) for one in written] == [(False, True), (True, True), (True, True)]
    tokens = len(lm.tokenizer(" " + long, add_special_tokens=False).input_ids)
    assert model.limits["A is"] == model.limits["C is"] == 8 and 2 * tokens <= model.limits["B is"] < 4 * tokens
    with pytest.raises(ValueError, match="at least one token"):
        generation.ask(model, probes, max_new_tokens=0)  # type: ignore[arg-type]
