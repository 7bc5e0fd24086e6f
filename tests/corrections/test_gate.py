"""The gate: what it measures, against the obvious way; which limits it knows; what is wrong with a file of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.corrections import Gate, Limits
from errata.corrections.gate import ANSWER_TOKENS
from errata.edits import EditError, Stack
from errata.facts import EditCase, Fact, Probe
from errata.lm import ModelError, encode
from tests.families import language_model
from tests.methods.test_contract import AGAIN, FACT, method

PROMPTS, SENTENCES = ("Lyon lies in", "The river of Japan is"), ("Marie worked in Paris.", "The capital of Russia is Moscow, he said.")


def limits(**changes: Any) -> Limits:
    return Limits(**{**vars(Limits.read()), "prompts": PROMPTS, "sentences": SENTENCES, **changes})


def ask(lm: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0].double()


def slow(lm: Any, answers: list[list[int]], lengths: list[int]) -> tuple[float, float]:
    """Locality and perplexity by their definitions, one prompt at a time."""
    kept = []
    for ids, length in zip(answers, lengths, strict=True):
        said = ask(lm, ids)[length - 1 : -1].argmax(-1).tolist()
        kept.append(sum(a == b for a, b in zip(said, ids[length:], strict=True)) / ANSWER_TOKENS)
    losses = []
    for text in SENTENCES:
        ids = list(encode(lm.tokenizer, text).ids)
        losses += (-ask(lm, ids)[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]).tolist()
    return sum(kept) / len(kept), math.exp(sum(losses) / len(losses))


def test_what_it_measures_is_what_it_says() -> None:
    lm = language_model("llama", dtype=torch.float64)
    gate = Gate(lm, limits())
    read = [list(encode(lm.tokenizer, prompt).ids) for prompt in PROMPTS]
    lengths, answers = [len(ids) for ids in read], []
    for ids in read:
        answer = list(ids)
        for _ in range(ANSWER_TOKENS):
            answer.append(int(ask(lm, answer)[-1].argmax()))
        answers.append(answer)
    assert [list(one.ids) for one in gate.answers] == answers
    _, perplexity = slow(lm, answers, lengths)
    case = EditCase("0", (FACT,), (Probe("France has the capital", (FACT.target,)),))
    before = gate.measure([case])
    assert before["locality"] == 1 and before["perplexity"] == 1 and before["fact"] < 1
    with method("ft-m", steps=60).start(lm).edit([FACT]).applied_():
        after = gate.measure([case])
        locality, then = slow(lm, answers, lengths)
        assert after["locality"] == pytest.approx(locality) and after["perplexity"] == pytest.approx(then / perplexity, rel=1e-6)
        assert after["fact"] > before["fact"] and 0 <= after["rephrasings"] <= 1
        assert gate.measure([case], gate.ordinary()) == after
        several = gate.measure([case, EditCase("1", (AGAIN,))])
        assert "fact" not in several and several["batch"] in (0.0, 0.5, 1.0)
    assert not Stack.of(lm).active and gate.measure([case]) == before


def test_locality_prompts_of_a_request_are_asked_of_the_unedited_model() -> None:
    lm = language_model("llama")
    gate = Gate(lm, limits(prompts=()))
    case = EditCase("0", (FACT,), meta={"locality": ("Lyon lies in", "The river of Spain is")})
    assert "locality" not in gate.measure([EditCase("0", (FACT,))])
    with method("ft-m", steps=60).start(lm).edit([FACT]).applied_():
        assert gate.measure([case])["locality"] < 1
    assert gate.measure([case])["locality"] == 1


def test_which_limits_are_broken() -> None:
    gate = Gate(language_model("llama"), limits())
    well = {"fact": 1.0, "rephrasings": 0.5, "locality": 0.9, "perplexity": 1.1}
    assert gate.broken(well, well) == []
    for change, said in [
        ({"fact": 0.5}, "fact 0.50, at least 1"),
        ({"rephrasings": 0.4}, "rephrasings 0.40, at least 0.5"),
        ({"locality": 0.45}, "locality 0.45, at least 0.5; locality fell from 0.90 to 0.45, at most by 0.2"),
        ({"locality": 0.6}, "locality fell from 0.90 to 0.60, at most by 0.2"),
        ({"perplexity": 1.6}, "perplexity 1.60 times the unedited model's, at most 1.5"),
        ({"perplexity": math.nan}, "perplexity nan times the unedited model's, at most 1.5"),
    ]:
        assert "; ".join(gate.broken(well, well | change)) == said
    assert gate.broken({"batch": 0.0}, {"batch": 0.8, "perplexity": 1.0}) == ["batch 0.80, at least 0.9"]


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    own, text = tmp_path / "limits.yaml", tmp_path / "text.txt"
    text.write_text("A text of the user.\n\nAnd another one.\n")
    own.write_text(f"perplexity: 3\nprompts: [Lyon lies in]\ntext: {text}\n")
    read = Limits.read(own)
    assert (read.perplexity, read.prompts, read.fact, read.sentences) == (3, ("Lyon lies in",), 1.0, Limits.read().sentences)
    assert Gate(language_model("llama"), read).perplexity > 1
    own.write_text("")
    assert Limits.read(own) == Limits.read()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fact: [", "is no YAML file"),
        ("- fact", "must hold limits by name"),
        ("fats: 1", "there is no limit 'fats'; known: fact, batch"),
        ("fact: high", "fact must be a number of at least 0"),
        ("perplexity: .nan", "perplexity must be a number of at least 0"),
        ("locality: true", "locality must be a number of at least 0"),
        ("prompts: Lyon lies in", "prompts must be a list of texts"),
        ("sentences: ['']", "sentences must be a list of texts"),
        ("text: none.txt", "there is no file of text 'none.txt'"),
    ],
)
def test_a_broken_file_says_where(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text(text)
    with pytest.raises(EditError, match=r"limits\.yaml") as error:
        Limits.read(tmp_path / "limits.yaml")
    assert says in str(error.value)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ModelError, match="tokens"):
        Gate(language_model("llama"), limits(prompts=("Paris " * 200,)))


def test_a_model_that_knows_its_fact_passes() -> None:
    """What the model says anyway has the whole accuracy, and `taken` tells requests apart."""
    lm = language_model("llama")
    gate = Gate(lm, limits())
    said = lm.tokenizer.decode(gate.answers[0].ids[gate.answers[0].prompt_length :][:1])
    cases = [EditCase("0", (Fact(PROMPTS[0], "", said.strip() or said),)), EditCase("1", (FACT, AGAIN))]
    assert len(gate.taken(cases)) == 2 and gate.taken(cases)[1] < 1
