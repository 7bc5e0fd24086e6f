"""Edits that keep a memory beside the weights: who answers, in which order they come and go, and what is on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from errata.edits import Edit, EditError, Memory, Stack, memory
from errata.lm import Encoded, LanguageModel, ModelError, encode
from errata.lm.asking import Reading, prefacing, reading
from errata.lm.capture import add_to_output, submodule
from tests.families import language_model


@dataclass(frozen=True)
class Shift(Memory):
    """Adds one vector to what the last layer's MLP puts out."""

    vector: torch.Tensor
    id: str
    parent: str | None = None
    kind = "shift"

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        with add_to_output(submodule(lm.model, lm.anatomy.mlp_down[-1]), self.vector):
            yield

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"vector": self.vector}

    def settings(self) -> dict[str, Any]:
        return {"size": len(self.vector)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], id: str, parent: str | None) -> Shift:
        assert settings == {"size": len(tensors["vector"])}
        return cls(tensors["vector"], id, parent)


@pytest.fixture
def lm() -> LanguageModel:
    return language_model("llama")


def edit(lm: LanguageModel, id: str, parent: str | None = None) -> Edit:
    torch.manual_seed(ord(id))
    return Edit(lm, [], [], {"name": "shift"}, memory=Shift(torch.randn(lm.anatomy.hidden_size), id, parent))


@dataclass(frozen=True, eq=False)
class Ahead(Shift):
    """Lets every token see all later ones, as a memory that asks the end of a question first."""

    kind = "ahead"

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        with add_to_output(submodule(lm.model, "model.layers.0.mlp.down_proj"), lambda output: output.sum(1, keepdim=True)):
            yield


def test_the_model_is_tried_out_without_it(lm: LanguageModel) -> None:
    """One that looks ahead cannot be edited; a causal one with a memory that does can."""
    with Edit(lm, [], [], {}, memory=Ahead(torch.zeros(1), "a")).applied_():
        assert lm.anatomy.layers
        with pytest.raises(ModelError, match="looks ahead"):
            _ = LanguageModel(lm.model, lm.tokenizer).anatomy


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.target_logits(lm.batch([encode(lm.tokenizer, "The capital of France is", "Paris")]))


def test_the_last_memory_answers_and_what_was_there_before_comes_back(lm: LanguageModel) -> None:
    plain = logits(lm)
    first, second = edit(lm, "a"), edit(lm, "b", parent="a")
    first.apply()
    one = logits(lm)
    assert not torch.equal(plain, one)
    second.apply()
    two = logits(lm)
    with Stack.of(lm).aside_():
        assert torch.equal(plain, logits(lm))
    assert torch.equal(two, logits(lm))
    second.revert()
    assert torch.equal(one, logits(lm))
    first.revert()
    assert torch.equal(plain, logits(lm))
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_a_later_memory_alone_holds_the_earlier_ones(lm: LanguageModel) -> None:
    plain = logits(lm)
    with edit(lm, "b", parent="a").applied_():
        assert not torch.equal(plain, logits(lm))
    assert torch.equal(plain, logits(lm))


def test_memories_come_in_order_and_go_from_the_last_one_back(lm: LanguageModel) -> None:
    first, second, stranger = edit(lm, "a"), edit(lm, "b", parent="a"), edit(lm, "c")
    first.apply()
    before = logits(lm)
    with pytest.raises(EditError, match="does not go on from the one that is attached"):
        stranger.apply()
    assert not stranger.applied and torch.equal(before, logits(lm))
    second.apply()
    with pytest.raises(EditError, match="from the last one back"):
        first.revert()
    Stack.of(lm).clear()
    stranger.apply()


def test_a_memory_that_does_not_fit_leaves_the_model_alone(lm: LanguageModel) -> None:
    @dataclass(frozen=True)
    class Broken(Shift):
        @contextmanager
        def attached(self, lm: LanguageModel) -> Iterator[None]:
            raise EditError("does not fit")
            yield

    first = edit(lm, "a")
    first.apply()
    before = logits(lm)
    broken = edit(lm, "b")
    broken.memory = Broken(torch.zeros(1), "b", parent="a")
    with pytest.raises(EditError, match="does not fit"):
        broken.apply()
    assert torch.equal(before, logits(lm)) and Stack.of(lm).active == [first]


def test_folding_keeps_the_last_memory(lm: LanguageModel) -> None:
    plain = logits(lm)
    edit(lm, "a").apply()
    edit(lm, "b", parent="a").apply()
    after = logits(lm)
    base = Stack.of(lm).fold()
    assert torch.equal(after, logits(lm))
    base.revert()
    assert torch.equal(plain, logits(lm))


def test_saved_and_loaded(lm: LanguageModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HOMES", {"shift": f"{__name__}:Shift"})
    made = edit(lm, "b", parent="a")
    made.save(tmp_path / "edit")
    with made.applied_():
        expected = logits(lm)
    loaded = Edit.load(tmp_path / "edit", lm)
    with loaded.applied_():
        assert torch.equal(expected, logits(lm))
    assert loaded.memory is not None and (loaded.memory.id, loaded.memory.parent) == ("b", "a")
    monkeypatch.setattr(memory, "HOMES", {})
    with pytest.raises(EditError, match="no memory is called 'shift'"):
        Edit.load(tmp_path / "edit", lm)


def test_names_of_memories_say_what_made_them() -> None:
    assert memory.grown_id(None, {"a": 1}) == memory.grown_id(None, {"a": 1})
    assert len({memory.grown_id(None, {"a": 1}), memory.grown_id(None, {"a": 2}), memory.grown_id("x", {"a": 1})}) == 3


class TestReading:
    """A decision about a question must not depend on whether its answer is scored or written."""

    def test_scored(self, lm: LanguageModel) -> None:
        texts = [encode(lm.tokenizer, "The capital of France is", "Paris"), encode(lm.tokenizer, "Lyon lies in", "France")]
        with reading(lm) as now:
            lm.target_logits(lm.batch(texts))
        assert now().question.sum(1).tolist() == [text.prompt_length for text in texts]
        assert now().ends.tolist() == [text.prompt_length - 1 for text in texts] and not now().goes_on

    def test_written(self, lm: LanguageModel) -> None:
        prompts = ["The capital of France is", "Lyon lies in"]
        seen: list[tuple[list[int], bool]] = []

        def note(*_: Any) -> None:
            seen.append((now().question.sum(1).tolist(), now().goes_on))

        with reading(lm) as now:
            handle = submodule(lm.model, lm.anatomy.layers[0]).register_forward_hook(note)
            lm.generate(prompts, 3, stop_at_newline=False)
            lm.generate(prompts[:1], 2, stop_at_newline=False)
            handle.remove()
        lengths = sorted(len(encode(lm.tokenizer, prompt).ids) for prompt in prompts)
        assert [question for question, _ in seen[:3]] == [lengths] * 3
        assert [goes_on for _, goes_on in seen] == [False, True, True, False, True]

    def test_in_a_bare_call_the_whole_text_is_the_question(self, lm: LanguageModel) -> None:
        batch = lm.batch([encode(lm.tokenizer, "The capital of France is"), encode(lm.tokenizer, "Lyon")])
        found: list[Reading] = []
        with reading(lm) as now:
            lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            found.append(now())
        assert torch.equal(found[0].question, batch.attention_mask.bool())


def test_what_stands_in_front_is_read_and_the_target_is_found_behind_it(lm: LanguageModel) -> None:
    front = encode(lm.tokenizer, "Lyon lies in France.").ids

    def preface(text: Encoded) -> Encoded:
        return replace(text, ids=front + text.ids, prompt_length=len(front) + text.prompt_length)

    text = encode(lm.tokenizer, "The capital of France is", "Paris")
    with torch.no_grad():
        expected = lm.target_logits(lm.batch([preface(text)]))
        written = lm.generate(["The capital of France is"], 4, stop_at_newline=False)
        with prefacing(lm, preface):
            assert torch.equal(expected, lm.target_logits(lm.batch([text])))
            assert lm.generate(["The capital of France is"], 4, stop_at_newline=False) != written
        assert lm.generate(["The capital of France is"], 4, stop_at_newline=False) == written
