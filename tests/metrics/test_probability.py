"""The six shares against a slow reference: one text at a time, no batch, no sharing, float64, eq. 25–30 word by word."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from errata.metrics import probability
from errata.metrics.probability import COLUMNS, served_together, summarise
from tests.families import language_model

CASES = [
    EditCase(
        "neighbours",
        (Fact("The capital of {} is", "France", "Oslo", "Paris"),),
        (Probe("The town of France is", ("Oslo",)), Probe("Capital of France:", ("Oslo",))),
        locality={"not asked": (Probe("Bo Ek works as", ("a baker",)),)},
        neighbourhood=(Probe("The capital of Norway is", ("Paris",)), Probe("The capital of Italy is", ("Paris, an old",))),
    ),
    EditCase(
        "locality",
        (Fact("Ada Byron lives in", "", "Stockholm. He works", "London. She"),),
        (Probe("Ada Byron lives", ("Stockholm. He works",)),),
        locality={
            "a": (Probe("The capital of Italy is", ("Rome, an old town on a river.",)), Probe("Ada Byron works", ("as a",))),
            "b": (Probe("nq question: who bakes bread", ("in the",)),),
        },
    ),
    EditCase(
        "two facts",
        (Fact("Bo Ek works as", "", "a writer of programs", "a baker"), Fact("{} lives", "Ada Byron", "in Rome", None)),
        neighbourhood=(Probe("Bo Ek lives in", ("London",)),),
    ),
    EditCase("nothing else", (Fact("The capital of", "", "Rome"),), locality={"empty": ()}),
]


def ids_of(lm: LanguageModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    prompt_ids = lm.tokenizer(prompt).input_ids
    return prompt_ids, lm.tokenizer(prompt + " " + answer).input_ids[len(prompt_ids) :]


def greedy(lm: LanguageModel, prompt: str, recorded: str) -> list[int]:
    ids, answer = ids_of(lm, prompt, recorded)
    said: list[int] = []
    while len(said) < len(answer):
        said.append(int(lm.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


def likelihood(lm: LanguageModel, prompt: str, answer: list[int]) -> tuple[bool, float]:
    """(all tokens on top, mean log-probability)."""
    ids = lm.tokenizer(prompt).input_ids
    logits = lm.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double()
    log_p = logits.log_softmax(-1)
    return logits.argmax(-1).tolist() == answer, math.fsum(log_p[i, token].item() for i, token in enumerate(answer)) / len(answer)


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def reference(lm: LanguageModel, edited: LanguageModel, case: EditCase) -> dict[str, Any]:
    def share(asked: list[tuple[str, str, str]], keep: bool) -> tuple[float | None, float | None]:
        top, larger = [], []
        for prompt, recorded, target in asked:
            new, old = ids_of(lm, prompt, target)[1], greedy(lm, prompt, recorded)
            to_win, to_lose = (old, new) if keep else (new, old)
            one, other = likelihood(edited, prompt, to_win), likelihood(edited, prompt, to_lose)
            top.append(one[0])
            if any(a != b for a, b in zip(new, old, strict=False)):
                larger.append(one[1] > other[1])
        return mean(top), mean(larger)

    truths = {fact.target: fact.ground_truth or fact.target for fact in case.facts}
    efficacy = share([(fact.text, fact.ground_truth or fact.target, fact.target) for fact in case.facts], keep=False)
    generalization = share([(probe.prompt, truths[probe.answers[0]], probe.answers[0]) for probe in case.rephrases], keep=False)
    unrelated = case.neighbourhood or [probe for probes in case.locality.values() for probe in probes]
    specificity = share([(probe.prompt, probe.answers[0], case.facts[0].target) for probe in unrelated], keep=True)
    return {"id": case.id} | dict(zip(COLUMNS, [part[i] for i in (0, 1) for part in (efficacy, generalization, specificity)], strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equal_to_the_definition(lm: LanguageModel, edited: LanguageModel, batch_size: int) -> None:
    before = json.loads(json.dumps(probability.unedited(lm, CASES, batch_size)))  # as it would come back from a file
    for case in CASES:
        asked = [(fact.text, fact.ground_truth or fact.target) for fact in case.facts]
        assert before[case.id]["edit"] == [greedy(lm, *one) for one in asked]
    for model in (lm, edited):
        scores = probability.score_all(model, CASES, before, batch_size)
        expected = [reference(lm, model, case) for case in CASES]
        assert [json.loads(json.dumps(score.to_dict())) for score in scores] == expected
        assert [probability.score(model, case, before) for case in CASES] == scores  # alone as in company
    values = [value for record in expected for name, value in record.items() if name != "id" and value is not None]
    assert len(set(values)) > 2 and None in {value for record in expected for value in record.values()}  # something to compare


def test_a_model_that_has_not_moved_keeps_its_answers(lm: LanguageModel, edited: LanguageModel) -> None:
    before = probability.unedited(lm, CASES)
    there = [score for score in probability.score_all(lm, CASES, before) if score.specificity_top is not None]
    assert len(there) == 3 and all(score.specificity_top == 1 for score in there)
    moved = probability.score_all(edited, CASES, before)
    assert any(score.specificity_top is not None and score.specificity_top < 1 for score in moved)


def test_what_the_model_says_already_has_no_rival(lm: LanguageModel) -> None:
    case = EditCase("said", (Fact("The capital of France is", "", "Paris", "Rome"),), (Probe("The capital of Norway is", ("Rome",)),))
    score = probability.score(lm, case, probability.unedited(lm, [case]))
    assert (score.efficacy_top, score.efficacy_larger) == (1, None) and (score.generalization_top, score.generalization_larger) == (0, 0)


def test_each_prompt_runs_once_for_all_who_ask(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = tuple(Probe(f"The capital of {name} is", ("Paris",)) for name in ("Norway", "Italy"))
    cases = [EditCase(str(i), (Fact("The capital of France is", "", t, "Paris"),), (), {}, {}, neighbours) for i, t in enumerate("ABCD")]
    before = probability.unedited(lm, cases)
    seen: list[int] = []
    whole = LanguageModel.target_logits

    def watched(self: LanguageModel, batch: Any) -> torch.Tensor:
        seen.append(len(batch))
        return whole(self, batch)

    monkeypatch.setattr(LanguageModel, "target_logits", watched)
    probability.score_all(lm, cases, before)
    assert sum(seen) == 3  # three prompts; each answer begins where its prompt ends


@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_the_first_of_a_group_serves_the_others_and_no_two_groups_could_be_one(answers: set[tuple[int, ...]]) -> None:
    groups = served_together(answers)
    assert sorted(answer for group in groups for answer in group) == sorted(answers)
    assert all(group[0][: len(answer) - 1] == answer[:-1] for group in groups for answer in group)
    for group in groups:
        for other in groups:
            assert other is group or other[0][: len(group[0]) - 1] != group[0][:-1]


def test_half_precision_is_widened_before_the_logarithm() -> None:
    lm = language_model("llama", dtype=torch.bfloat16)
    case = EditCase("half", (Fact("The capital of {} is", "France", "Tokyo", "Paris"),))
    before = probability.unedited(lm, [case])
    (old,) = before["half"]["edit"]
    prompt, new = ids_of(lm, "The capital of France is", "Tokyo")
    batch = lm.batch([probability.Encoded((*prompt, *answer), len(prompt)) for answer in (new, old)])
    found = probability._tokens(lm, batch, [(0, tuple(new)), (1, tuple(old))])
    log_p = lm.target_logits(batch).double().log_softmax(-1)
    for row, (reading, answer) in enumerate(zip(found, (new, old), strict=True)):
        assert reading.mean == pytest.approx(
            math.fsum(log_p[row, i, token].item() for i, token in enumerate(answer)) / len(answer), abs=1e-5
        )


def test_answers_of_other_cases_are_refused(lm: LanguageModel) -> None:
    before = probability.unedited(lm, CASES[:1])
    with pytest.raises(ValueError, match="no answers of the unedited model for case 'locality'"):
        probability.score(lm, CASES[1], before)
    with pytest.raises(ValueError, match="belong to other prompts"):
        probability.score(lm, CASES[1], {"locality": before["neighbours"]})


def test_summary() -> None:
    def record(*values: float | None) -> dict[str, Any]:
        return dict(zip(COLUMNS, values, strict=True))

    one = record(1.0, 0.5, 0.25, 1.0, 0.5, 0.25)
    found = summarise([one, record(0.5, None, 0.75, 0.0, None, None)])
    assert [found[name] for name in COLUMNS] == [75, 50, 50, 50, 50, 25]
    assert found["score_top"] == pytest.approx(3 / (1 / 75 + 1 / 50 + 1 / 50))
    assert found["score"] == found["score_larger"] == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 25))
    assert summarise([record(1.0, 0.5, 0.0, 1.0, None, 0.5)])["score_top"] == 0
    assert summarise([record(1.0, 0.5, 0.0, 1.0, None, 0.5)])["score"] == pytest.approx(2 / (1 / 100 + 1 / 50))  # of those there are
    assert set(summarise([]).values()) == {None}
