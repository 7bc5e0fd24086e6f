"""Token accuracy against a slow reference that runs one text at a time and follows EVALUATION §1 word by word."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence

import pytest
import torch

from errata.facts import EditCase, Fact, Probe
from errata.lm import Encoded, LanguageModel
from errata.metrics import summarise, teacher_forced

CASES = [
    EditCase(
        "full",
        (Fact("The capital of {} is", "France", "Paris, of course"),),
        (Probe("The town of France is", ("Paris town",)), Probe("Capital of France:", ("Paris.",))),
        {
            "Reasoning": (
                Probe("The capital of Norway is", ("Rome", "Oslo.", "Stockholm")),
                Probe("Ada Byron lives", ("in Rome. She works",)),
            ),
            "Subject_Aliasing": (Probe("The capital of Italy", ("is Rome, a new town",)),),
        },
        {
            "Relation_Specificity": (
                Probe("Bo Ek lives in", ("Stockholm. He is", "Paris")),
                Probe("Ada Byron", ("lives in London. She is",)),
            ),
            "nq": (Probe("nq question: who bakes bread", ("in the evening baker Bo",)),),
        },
    ),
    EditCase("two facts", (Fact("Bo Ek works as", "", "a baker of bread"), Fact("{} lives", "Ada Byron", "in London. He works"))),
    EditCase("no groups", (Fact("The capital of", "", "Italy is Oslo"),), portability={}, locality={"empty": ()}),
    EditCase(
        "local", (Fact("Ada", "", "Ek lives"),), locality={"a": (Probe("The capital of Italy is", ("Rome, an old river on a town",)),)}
    ),
]


def reference_tokens(lm: LanguageModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(the answer's tokens, the arg-max at their places): one text, no batch, no padding, all logits."""
    start = len(lm.tokenizer(prompt).input_ids)
    ids = lm.tokenizer(prompt + " " + answer).input_ids
    logits = lm.model(torch.tensor([ids])).logits[0]
    return ids[start:], [int(logits[place - 1].argmax()) for place in range(start, len(ids))]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def share(one: list[int], other: list[int]) -> float:
    assert len(one) == len(other) > 0
    return mean([float(a == b) for a, b in zip(one, other, strict=True)])


def reference(lm: LanguageModel, edited: LanguageModel, case: EditCase) -> dict[str, dict[str, list[float]]]:
    """kind -> group -> accuracy of each probe."""

    def right(prompt: str, answer: str) -> float:
        return share(*reference_tokens(edited, prompt, answer))

    def same(probe: Probe) -> float:
        return share(*(reference_tokens(model, probe.prompt, probe.answers[0])[1] for model in (lm, edited)))

    found: dict[str, dict[str, list[float]]] = {"reliability": {"edit": [right(fact.text, fact.target) for fact in case.facts]}}
    if case.rephrases:
        found["generality"] = {"rephrase": [right(probe.prompt, probe.answers[0]) for probe in case.rephrases]}
    portability = {
        name: [max(right(p.prompt, answer) for answer in p.answers) for p in probes] for name, probes in case.portability.items() if probes
    }
    locality = {name: [same(probe) for probe in probes] for name, probes in case.locality.items() if probes}
    return found | ({"portability": portability} if portability else {}) | ({"locality": locality} if locality else {})


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equal_to_the_definition_to_the_last_digit(lm: LanguageModel, edited: LanguageModel, batch_size: int) -> None:
    before = json.loads(json.dumps(teacher_forced.unedited(lm, CASES, batch_size)))  # as it would come back from a file
    scores = teacher_forced.score_all(edited, CASES, before, batch_size)
    expected = [reference(lm, edited, case) for case in CASES]
    for case, score, want in zip(CASES, scores, expected, strict=True):
        record = json.loads(json.dumps(score.to_dict()))
        assert record["id"] == case.id and record["probes"] == want
        for kind in ("reliability", "generality", "portability", "locality"):
            assert record[kind] == getattr(score, kind) == (mean([mean(group) for group in want[kind].values()]) if kind in want else None)
        assert teacher_forced.score(edited, case, before, batch_size) == score  # alone as in company
    everything = [value for want in expected for groups in want.values() for group in groups.values() for value in group]
    assert 0 < mean(everything) < 1 and len(set(everything)) > 4  # the comparison had something to compare

    summary = summarise([score.to_dict() for score in scores])
    columns = []
    for kind in ("reliability", "generality", "portability", "locality"):
        by_record = [mean([mean(group) for group in want[kind].values()]) for want in expected if kind in want]
        flat = [value for want in expected for group in want.get(kind, {}).values() for value in group]
        columns.append(100 * mean(by_record))
        assert summary[kind] == columns[-1] and summary[f"{kind}_flat"] == 100 * mean(flat)
    assert summary["average"] == mean(columns)


def test_the_means_over_groups_and_over_probes_differ(lm: LanguageModel, edited: LanguageModel) -> None:
    score = teacher_forced.score(edited, CASES[0], teacher_forced.unedited(lm, CASES))
    assert score.metrics["portability"] == mean(list(score.groups["portability"].values())) != mean(score.flat["portability"])


def test_a_model_that_has_not_moved_is_local_and_one_that_has_is_not(lm: LanguageModel, edited: LanguageModel) -> None:
    before = teacher_forced.unedited(lm, CASES)
    alone = {case.id: teacher_forced.score(lm, case, before).locality for case in CASES}
    assert alone == {"full": 1.0, "two facts": None, "no groups": None, "local": 1.0}
    assert [score.locality for score in teacher_forced.score_all(lm, CASES, before)] == list(alone.values())
    moved = teacher_forced.score(edited, CASES[0], before).locality
    assert moved is not None and moved < 1
    assert teacher_forced.score(edited, CASES[0], None).locality is None


def test_the_order_of_texts_changes_nothing(lm: LanguageModel) -> None:
    texts = [
        (probe.prompt, answer) for case in CASES for groups in case.portability.values() for probe in groups for answer in probe.answers
    ]
    texts += [("The capital of France is", "Paris " * n) for n in (1, 9, 4)]
    there = dict(zip(texts, teacher_forced.predict(lm, texts, batch_size=4), strict=True))
    shuffled = random.Random(0).sample(texts, len(texts))
    assert dict(zip(shuffled, teacher_forced.predict(lm, shuffled, batch_size=4, batch_tokens=40), strict=True)) == there
    assert teacher_forced.predict(lm, []) == []


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_batches_hold_what_they_may(lm: LanguageModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    whole = LanguageModel.rows_at

    def watched(self: LanguageModel, positions: torch.Tensor, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(inputs["input_ids"].shape))
        return whole(self, positions, mask, **inputs)

    monkeypatch.setattr(LanguageModel, "rows_at", watched)
    teacher_forced.predict(lm, [("Ada " * n, "lives in London") for n in range(1, 30)], rows, batch_tokens=120)
    assert sum(size for size, _ in seen) == 29
    assert all(size <= rows and (size == 1 or size * length <= 120) for size, length in seen)
    assert rows != 32 or max(size for size, _ in seen) > 3  # they are used, too


def test_another_batch_begins_before_padding_outweighs_it(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Encoded(tuple(range(n)), n - 1) for n in (5, 40, 5, 41, 5, 44, 6, 5)]
    for padding, wanted in ((8, [[5, 5, 5, 5, 6], [40, 41, 44]]), (3, [[5, 5, 5, 5], [6], [40, 41], [44]])):
        monkeypatch.setattr(teacher_forced, "CPU_PADDING", padding)
        assert [[len(texts[i].ids) for i in chosen] for chosen in teacher_forced.batches(lm, texts)] == wanted


def test_outputs_of_another_model_or_case_are_refused(lm: LanguageModel) -> None:
    before = teacher_forced.unedited(lm, CASES[:1])
    with pytest.raises(ValueError, match="no outputs of the unedited model for case 'local'"):
        teacher_forced.score(lm, CASES[3], before)
    with pytest.raises(ValueError, match="other probes or another tokenizer"):
        teacher_forced.score(lm, CASES[3], {"local": before["full"]})


def test_the_model_can_be_trained_after_it_was_measured(lm: LanguageModel) -> None:
    teacher_forced.unedited(lm, CASES)
    weight = lm.model.get_input_embeddings().weight.requires_grad_(True)
    try:
        lm.model(torch.tensor([[0, 5, 6]])).logits.sum().backward()
        assert weight.grad is not None and torch.isfinite(weight.grad).all()
    finally:
        weight.requires_grad_(False)
        weight.grad = None
