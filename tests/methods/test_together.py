"""Many single edits at once: each is the edit that it would be alone, whatever stands beside it in the batch.

The references are the paths that edit one by one, which have tests of their own against plain PEFT and plain fine-tuning. In float64,
because Adam turns a gradient that is nothing but rounding into a step of full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from errata import methods
from errata.edits import Edit, EditError
from errata.facts import Fact, FactError
from errata.lm import LanguageModel
from errata.objectives import CrossEntropy, Overtone
from tests.families import FAMILIES, language_model
from tests.methods.test_contract import QUICK

REQUESTS = [
    [Fact("The capital of {} is", "France", "Tokyo")],
    [Fact("{} was born in", "Marie Curie", "Lyon, in France")],
    [Fact("In {} there is a very old town, and its name is", "Japan", "Paris")],
    [Fact("The capital of {} is", "Japan", "Paris"), Fact("{} lies in", "Lyon", "Japan, they say")],  # two facts of unlike length
    [Fact("{} worked in", "Pierre", "Warsaw")],
    [Fact("{} is the capital of", "Москва", "Japan"), Fact("{} lies in", "Paris", "Russia")],
]
SEEDS = [11, 5, 8, 13, 2, 99]
NAMES = ("ft-l", "ft-m", "lora", "rome", "memit", "rect", "alphaedit", "melo")


def method(name: str, **changes: Any) -> methods.Method:
    return methods.get(name, **{**QUICK[name], **changes})


def one_by_one(editor: methods.Method, lm: LanguageModel, objective: Any = None, some: Sequence[int] = range(6)) -> list[Edit]:
    return [editor.start(lm, objective=objective, seed=SEEDS[i]).complete(REQUESTS[i]) for i in some]


def assert_same(many: list[Edit | FactError], alone: list[Edit], atol: float = 1e-6) -> None:
    assert len(many) == len(alone)
    for made, expected in zip(many, alone, strict=True):
        assert isinstance(made, Edit)
        assert made.facts == expected.facts and made.method == expected.method and made.objective == expected.objective
        assert [(delta.kind, delta.path) for delta in made.deltas] == [(delta.kind, delta.path) for delta in expected.deltas]
        assert made.diagnostics["steps"] == expected.diagnostics["steps"]
        assert made.diagnostics["losses"] == pytest.approx(expected.diagnostics["losses"], rel=1e-5, abs=1e-7)
        assert (made.memory is None) == (expected.memory is None)
        if made.memory is not None and expected.memory is not None:
            assert made.memory.id == expected.memory.id and made.memory.settings() == approximately(expected.memory.settings())
        for mine, other in zip([*made.deltas, made.memory], [*expected.deltas, expected.memory], strict=True):
            if mine is not None and other is not None:
                for name, tensor in other.tensors().items():
                    torch.testing.assert_close(mine.tensors()[name], tensor, atol=atol, rtol=1e-5)


def approximately(value: Any) -> Any:
    """Its numbers up to rounding, at any depth."""
    if isinstance(value, dict):
        return {name: approximately(one) for name, one in value.items()}
    if isinstance(value, list):
        return [approximately(one) for one in value]
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize("objective", [CrossEntropy(), Overtone(epsilon=2.0, reduction="mean"), Overtone(dynamic=False)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_edit_it_would_be_alone(name: str, objective: Any) -> None:
    """Texts of unlike length, several facts in a case, ends at unlike steps."""
    lm = language_model("llama", dtype=torch.float64)
    changes = {"lora": {"steps": 6, "dropout": 0.2}, "melo": {"steps": 6, "halve_every": 2}}
    editor = method(name, **changes.get(name, {"stop": 3.0, "steps": 8}))
    alone = one_by_one(editor, lm, objective)
    if name == "ft-m":
        assert len({edit.diagnostics["steps"] for edit in alone}) > 1
    assert_same(editor.many(lm, REQUESTS, SEEDS, objective), alone)


@pytest.mark.parametrize("objective", [CrossEntropy(), Overtone(dynamic=False)], ids=str)
def test_those_that_go_on_keep_what_is_theirs(objective: Any) -> None:
    """Edits that stop early stand before and between others of their length in the batch."""
    lm, editor = language_model("llama", dtype=torch.float64), method("ft-m", stop=3.0, steps=12)
    requests = [[Fact("The capital of {} is", s, target)] for s in ("France", "Japan") for target in ("Tokyo", "Paris", "Warsaw", "Lyon")]
    alone = [editor.start(lm, objective=objective).complete(facts) for facts in requests]
    ends = [edit.diagnostics["steps"] for edit in alone]
    assert ends[1] < ends[0] > ends[3] < ends[2] and len(set(ends)) > 3
    assert_same(editor.many(lm, requests, [0] * len(requests), objective), alone)


@pytest.mark.parametrize("name", ("ft-m", "lora", "memit", "melo"))
@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_architecture(family: str, name: str) -> None:
    if (family, name) == ("gemma2", "memit"):
        pytest.skip("Gemma 2 of transformers puts NaN at padding in float64, so there are no second moments")
    lm = language_model(family, dtype=torch.float64)
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    editor = method(name, steps=2, **({"dropout": 0.2} if name == "lora" else {}))
    some = [0, 1, 4]
    atol = 1e-4 if family == "gpt_neo" else 1e-5  # the norms compute in float32, in GPT-Neo attention too
    made = editor.many(lm, [REQUESTS[i] for i in some], [SEEDS[i] for i in some])
    assert_same(made, one_by_one(editor, lm, some=some), atol=atol)
    assert all(torch.equal(parameter, before[name]) for name, parameter in lm.model.named_parameters())
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags and not hasattr(lm.model, "peft_config")


@pytest.mark.parametrize("name", ["ft-m", "lora", "melo"])
def test_a_finished_edit_stops_unless_it_is_to_coast(name: str) -> None:
    """Algorithm 1 has no stop: as published, Adam's momentum goes on moving an edit whose tokens are all clipped."""
    lm, editor = language_model("llama", dtype=torch.float64), method(name, steps=40)
    easy = [Fact("The capital of {} is", "Japan", "Paris")]
    stops, coasts = (Overtone(epsilon=2.5, reduction="mean", coast=coast) for coast in (False, True))
    short, long = (editor.start(lm, objective=objective).complete(easy).diagnostics for objective in (stops, coasts))
    assert short["steps"] < 40 == long["steps"]
    assert long["losses"][: len(short["losses"])] == short["losses"]
    assert [made.diagnostics["steps"] for made in editor.many(lm, [easy] * 2, SEEDS[:2], coasts) if isinstance(made, Edit)] == [40, 40]


@pytest.mark.parametrize("layer", [0, 3])
def test_ft_in_the_first_and_the_last_layer(layer: int) -> None:
    lm = language_model("llama", dtype=torch.float64)
    editor = method("ft-m", layer=layer, steps=5, clamp=0.15)
    assert_same(editor.many(lm, REQUESTS, SEEDS), one_by_one(editor, lm))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_edited_does_not_hurt_its_neighbours(name: str) -> None:
    lm = language_model("llama", dtype=torch.float64)
    editor = method(name, steps=3)
    long = Fact("word " * 200 + "{} is", "France", "Tokyo")
    made = editor.many(lm, [REQUESTS[0], [long], REQUESTS[1], []], [11, 3, 5, 4])
    assert isinstance(made[1], FactError) and "too long" in str(made[1]) and isinstance(made[3], FactError)
    alone = [editor.start(lm, seed=seed).complete(facts) for facts, seed in ((REQUESTS[0], 11), (REQUESTS[1], 5))]
    assert_same([made[0], made[2]], alone)


@pytest.mark.parametrize("name", ["ft-l", "ft-m", "lora"])
def test_beside_a_memory_each_is_the_edit_it_would_be_alone(name: str) -> None:
    """One that has taken a question of theirs: it is asked about whole texts, also by edits that begin above it."""
    lm = language_model("llama", dtype=torch.float64)
    editor = method(name, steps=3)
    with method("melo", steps=20).start(lm).complete(REQUESTS[0]).applied_():
        alone = one_by_one(editor, lm)
        assert_same(editor.many(lm, REQUESTS, SEEDS), alone)
        with pytest.raises(EditError):
            method("melo").many(lm, REQUESTS, SEEDS)
    assert one_by_one(editor, lm)[0].diagnostics["losses"] != alone[0].diagnostics["losses"], "it has answered"


def test_the_default_is_one_by_one() -> None:
    """A method that says nothing about batches edits as ever, to the bit, each edit under its own seed."""
    lm = language_model("llama")
    editor = method("lora", steps=2, dropout=0.2)
    made = methods.Method.many(editor, lm, REQUESTS[:2], SEEDS[:2])
    torch.rand(3)
    for ours, theirs in zip(made, one_by_one(editor, lm), strict=False):
        assert isinstance(ours, Edit)
        assert all(torch.equal(a.tensors()["left"], b.tensors()["left"]) for a, b in zip(ours.deltas, theirs.deltas, strict=True))


def test_pefts_draws_are_repeated() -> None:
    """Injecting adapters for each edit costs more than training it in a batch, so the draws are repeated; if not, this says so."""
    from errata.methods import lora

    for family in ("llama", "gpt2"):
        lm = language_model(family, dtype=torch.float64)
        started: Any = methods.get("lora", rank=4).start(lm).method
        begun, generator = lora._injected(lm, started, 3)
        again, other = lora._drawn(lm, started, 3, begun)
        assert list(begun) == list(again) and all(torch.equal(begun[path][0], again[path][0]) for path in begun)
        assert torch.equal(generator.get_state(), other.get_state())
