"""General ability on made-up tests: the harness's numbers are those of one prompt at a time, and its own class finds the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.cli import call
from errata.edits import Stack
from errata.facts import Fact
from errata.lm import LanguageModel
from errata.metrics import ability, perplexity
from tests.families import language_model
from tests.methods.test_contract import method

TOWNS = ["Paris is a town", "Oslo bread old", "in Rome she", "Bo Ek lives", "a baker in the evening", "the river", "town a is", "He works"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight tests of each task, the right answers in turn."""
    folder = tmp_path / "ability"
    folder.mkdir()
    pairs = [{"sentence1": one, "sentence2": other} for one, other in zip(TOWNS, reversed(TOWNS), strict=True)]
    records: dict[str, list[dict[str, Any]]] = {
        "cola": [{"sentence": text, "label": i % 2} for i, text in enumerate(TOWNS)],
        "sst2": [{"sentence": text, "label": str(i // 4)} for i, text in enumerate(TOWNS)],
        "mrpc": [pair | {"label": i % 2} for i, pair in enumerate(pairs)],
        "rte": [pair | {"label": i % 2} for i, pair in enumerate(pairs)],
        "nli": [pair | {"label": ("entailment", "not_entailment")[i % 2]} for i, pair in enumerate(pairs)],
        "mmlu": [{"question": text, "choices": TOWNS[i % 4 : i % 4 + 4], "answer": i % 4} for i, text in enumerate(TOWNS)],
    }
    for name, own in records.items():
        (folder / f"{name}.json").write_text(json.dumps(own))
    return tmp_path


def by_hand(lm: LanguageModel, task: ability.Task, record: dict[str, Any]) -> int:
    """The answer with the greatest log p, one text at a time."""
    sums = []
    for answer in task.answers:
        before = lm.tokenizer(task.text(record)).input_ids
        ids = lm.tokenizer(f"{task.text(record)} {answer}").input_ids
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        sums.append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids))))
    return max(range(len(sums)), key=sums.__getitem__)


def test_accuracy_is_that_of_one_prompt_at_a_time(lm: LanguageModel, data: Path) -> None:
    found = ability.measure(lm, data_dir=data)
    assert list(found) == list(ability.TASKS)
    for name, task in ability.TASKS.items():
        records = ability.read(name, data)
        right = [by_hand(lm, task, record) == task.label(record) for record in records]
        assert found[name]["accuracy"] == pytest.approx(100 * sum(right) / len(right)) and found[name]["n"] == 8
    assert ability.measure(lm, ["cola"], limit=3, data_dir=data)["cola"]["n"] == 3


def test_the_harness_own_class_says_the_same(lm: LanguageModel) -> None:
    """Log-likelihoods in batches, and texts, are those of lm-eval's class for transformers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from errata.metrics.harness import Live

    ours, theirs = Live(lm), HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1)
    asked = [Instance("loglikelihood", {}, (text, " Paris is"), i) for i, text in enumerate(TOWNS)]
    for one, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]
    wish = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    written = [Instance("generate_until", {}, (text, wish), i) for i, text in enumerate(TOWNS)]
    assert ours.generate_until(written) == theirs.generate_until(written)


@pytest.mark.parametrize("name", ["ft-m", "melo"])
def test_edits_count_and_the_model_is_left_as_it_was(name: str, data: Path) -> None:
    lm = language_model("llama")
    before = {path: weight.clone() for path, weight in lm.model.state_dict().items()}
    edit = method(name).start(lm).complete([Fact("The capital of {} is", "France", "Tokyo")])
    with edit.applied_():
        ability.measure(lm, ["cola"], data_dir=data)
        ability.measure(lm, ["cola"], "generate", data_dir=data)
        assert Stack.of(lm).holds(edit)
    assert all(torch.equal(weight, before[path]) for path, weight in lm.model.state_dict().items())


def test_an_answer_is_a_word_of_its_own() -> None:
    assert ability._first_said(" Yes, no.", ("no", "yes")) == 1 and ability._first_said(" yesterday", ("no", "yes")) is None
    assert ability._first_said("(B) is right, not A", ("A", "B", "C", "D")) == 1


def test_scores_against_their_definitions() -> None:
    """Two labels, three of four right: F1 is 2·TP / (2·TP + FP + FN) of each label, weighted by its tests."""
    scores = ability._scores(ability.TASKS["cola"], [0, 0, 1, 1], [0, None, 1, 1])
    assert scores["accuracy"] == 75 and scores["answered"] == 75
    assert scores["f1"] == pytest.approx(100 * (0.5 * (2 / 3) + 0.5 * 1.0), abs=1e-4)


def test_perplexity_is_the_exponent_of_the_mean_loss(lm: LanguageModel) -> None:
    losses = []
    for text in TOWNS:
        ids = torch.tensor([lm.tokenizer(text).input_ids])
        with torch.no_grad():
            log_p = lm.model(ids).logits[0].float().log_softmax(-1)
        losses += [-float(log_p[place - 1, ids[0, place]]) for place in range(1, ids.shape[1])]
    expected = float(torch.tensor(losses).mean().exp())
    assert perplexity.perplexity(lm, perplexity.held_out(lm, TOWNS)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{", "not valid JSON"),
        ("{}", "must hold an array"),
        ('[{"sentence": "a"}]', "record 0: not a test of cola (KeyError: 'label')"),
        ('[{"sentence": "a", "label": 7}]', "not a test of cola"),
    ],
)
def test_a_broken_file_is_named(data: Path, content: str, wrong: str) -> None:
    (data / "ability" / "cola.json").write_text(content)
    with pytest.raises(ability.AbilityError, match=r"cola\.json") as found:
        ability.read("cola", data)
    assert wrong in str(found.value)


def test_what_cannot_be_asked(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ERRATA_DATA", raising=False)
    for arguments, wrong in (
        (["--ability"], "where are the tests of 'cola'?"),
        (["--ability", "--data-dir", str(tmp_path)], f"no cola.json in {tmp_path}"),
        (["--ability", "--variant", "guess"], "unknown variant 'guess'"),
        (["--ability", "--tasks", ","], "--tasks names none"),
        ([], "eval needs --data D, or --ability"),
    ):
        assert call(["eval", "--model", "atlas", *arguments]) == 2
        assert wrong in capsys.readouterr().err


def test_scales_of_other_tasks_go_by_name_not_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.98 and 1.03 bits are the same scale, and so are -0.02 and 0.03 of a correlation."""
    for bits, mcc in ((0.98, -0.02), (1.03, 0.03)):
        numbers = {"bits_per_byte,none": bits, "mcc,none": mcc, "acc_stderr,none": 0.1}
        found = {"results": {"t": numbers}, "n-samples": {"t": {"effective": 5}}}
        monkeypatch.setattr(ability, "_harness", lambda *_, found=found: found)
        assert ability._others(None, ["t"], None) == {"t": {"n": 5.0, "bits_per_byte": bits, "mcc": 100 * mcc}}  # type: ignore[arg-type]
