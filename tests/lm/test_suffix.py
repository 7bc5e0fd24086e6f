"""From one token and one layer on: the reference runs each whole text alone, all layers, without padding or cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import errata
from errata.facts import Fact
from errata.lm import suffix as module
from errata.lm.capture import capture
from errata.lm.errors import ModelError
from errata.lm.model import LanguageModel
from errata.lm.suffix import Suffix, is_exact
from errata.lm.tokens import Encoded, encode
from tests.families import FAMILIES, HIDDEN, LAYERS, language_model
from tests.lm.test_contract import FACTS, assert_untouched, state_of


def texts_of(lm: LanguageModel, facts: tuple[Fact, ...] = FACTS) -> list[Encoded]:
    return [encode(lm.tokenizer, fact.text, fact.target, fact.subject_span) for fact in facts]


def starts_of(texts: list[Encoded]) -> list[int]:
    """Prefixes of all kinds in one batch: one ends with the subject, one is empty, one is all but the last token before the target."""
    starts = [int(text.subject_last or 0) for text in texts]
    starts[1], starts[2] = 0, texts[2].prompt_length - 1
    return starts


def changes_of(texts: list[Encoded], starts: list[int], like: Tensor) -> list[Tensor]:
    """Something for each token from the start to the last but one [length - start - 1, d]; the last one predicts nothing."""
    chance = torch.Generator().manual_seed(0)
    return [
        torch.randn(len(text.ids) - start - 1, like.shape[-1], generator=chance).to(like.dtype)
        for text, start in zip(texts, starts, strict=True)
    ]


def slowly(lm: LanguageModel, layer: int, text: Encoded, start: int, change: Tensor) -> Tensor:
    """Logits [tokens of the target, V] of one whole text, with `change` added from `start` on to what enters the layer."""

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]  # [1, T, d]
        changed = torch.cat([hidden[:, :start], hidden[:, start:-1] + change, hidden[:, -1:]], 1)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    handle = lm.model.get_submodule(lm.anatomy.layers[layer]).register_forward_pre_hook(add, with_kwargs=True)
    try:
        logits = lm.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits[text.prompt_length - 1 : -1]  # type: ignore[no-any-return]


def changed(suffix: Suffix, changes: list[Tensor]) -> Tensor:
    """`suffix.states` with each text's change from its column on."""
    states = suffix.states.clone()
    for row, (column, change) in enumerate(zip(suffix.columns.tolist(), changes, strict=True)):
        states[row, column : column + len(change)] += change
    return states


def assert_same(suffix: Suffix, lm: LanguageModel, layer: int, texts: list[Encoded], starts: list[int]) -> None:
    """Logits, and their gradient for every state from the start on, are those of each text alone."""
    narrow = lm.dtype == torch.float32
    close = {"atol": 2e-4, "rtol": 1e-3} if narrow else {"atol": 1e-5, "rtol": 1e-5}  # GPT-J and GPT-Neo attend in float32, always
    changes = changes_of(texts, starts, suffix.states)
    states = changed(suffix, changes).requires_grad_()
    logits = suffix.logits(states)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), states)
    assert logits.shape == (*suffix.mask.shape, lm.model.config.vocab_size)
    assert not logits[~suffix.mask].any()
    for row, (text, start, change) in enumerate(zip(texts, starts, changes, strict=True)):
        change = change.requires_grad_()
        count, column = len(text.target_ids), int(suffix.columns[row])
        expected = slowly(lm, layer, text, start, change)
        (wanted,) = torch.autograd.grad((expected * weights[row, :count]).sum(), change)
        assert suffix.targets[row, :count].tolist() == list(text.target_ids)
        assert suffix.mask[row].tolist() == [True] * count + [False] * (suffix.mask.shape[1] - count)
        torch.testing.assert_close(logits[row, :count], expected, **close)
        torch.testing.assert_close(gradient[row, column : column + len(change)], wanted, **close)
        assert wanted.abs().max() > 0
        assert not gradient[row, column + len(change) :].any()


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_logits_and_gradients_are_those_of_each_whole_text(name: str, layer: int) -> None:
    lm = language_model(name, dtype=torch.float64)
    texts = texts_of(lm)
    starts = starts_of(texts)
    suffix, before = Suffix(lm, texts, layer, starts, cached=True), state_of(lm)
    rest = max(len(text.ids) - start for text, start in zip(texts, starts, strict=True)) - 1  # the last token predicts no target
    assert suffix.states.shape == (len(texts), rest, HIDDEN)
    assert not suffix.states.requires_grad and not suffix.columns.any()
    assert_same(suffix, lm, layer, texts, starts)
    assert_untouched(lm, before)


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_the_whole_texts_give_the_same(name: str, layer: int) -> None:
    lm = language_model(name, dtype=torch.float32 if name == "gemma2" else torch.float64)  # in float64 its padding is NaN
    texts = texts_of(lm)
    starts = starts_of(texts)
    suffix = Suffix(lm, texts, layer, starts, cached=False)
    assert suffix.columns.tolist() == starts and not suffix.cached
    assert_same(suffix, lm, layer, texts, starts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_family_takes_the_cached_way(name: str, dtype: torch.dtype) -> None:
    lm = language_model(name, dtype=dtype)
    assert [is_exact(lm, layer) for layer in range(LAYERS)] == [True] * LAYERS


def test_only_tokens_and_layers_that_can_change_run(name: str) -> None:
    lm, layer = language_model(name), 2
    texts = texts_of(lm)
    suffix = Suffix(lm, texts, layer)
    assert suffix.cached and suffix.columns.tolist() == [0] * len(texts)
    paths = {path: path for path in lm.anatomy.mlp_down} | {"head": lm.anatomy.head}
    with torch.no_grad(), capture(lm.model, paths, inputs=True) as ran:
        suffix.logits(suffix.states)
    rest = max(len(text.ids) - int(text.subject_last or 0) for text in texts) - 1
    assert list(ran) == [*lm.anatomy.mlp_down[layer:], "head"]
    assert all(ran[path].shape[:2] == (len(texts), rest) for path in lm.anatomy.mlp_down[layer:])
    assert ran["head"].shape[:2] == (1, suffix.mask.sum())


def test_a_call_leaves_the_cache_as_it_was(name: str) -> None:
    lm = language_model(name)
    suffix = Suffix(lm, texts_of(lm), 1, cached=True)
    kept = [(id(p.keys), p.keys.clone(), id(p.values), p.values.clone()) for p in suffix._prefixes.values()]
    states = suffix.states.clone()
    first, second = (suffix.logits(suffix.states.clone().requires_grad_()) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(suffix.states, states)
    assert [id(p.keys) for p in suffix._prefixes.values()] == [keys for keys, *_ in kept]
    for prefix, (_, keys, same_values, values) in zip(suffix._prefixes.values(), kept, strict=True):
        assert torch.equal(prefix.keys, keys) and torch.equal(prefix.values, values) and id(prefix.values) == same_values
        assert not prefix.keys.requires_grad


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True, True])])
def test_texts_that_are_kept(name: str, rows: Tensor, cached: bool) -> None:
    lm, layer = language_model(name), 1
    texts = texts_of(lm)
    starts = starts_of(texts)
    whole = Suffix(lm, texts, layer, starts, cached=cached)
    indices = torch.arange(len(texts))[rows].tolist()
    left, first = [texts[i] for i in indices], [starts[i] for i in indices]
    kept, anew = whole.keep(rows), Suffix(lm, left, layer, first, cached=cached)
    assert len(kept) == len(indices) and len(whole) == len(texts)
    for part in ("columns", "targets", "mask"):
        assert torch.equal(getattr(kept, part), getattr(anew, part))
    assert kept.states.shape == anew.states.shape
    assert {i: p.keys.shape for i, p in kept._prefixes.items()} == {i: p.keys.shape for i, p in anew._prefixes.items()}
    assert_same(kept, lm, layer, left, first)
    assert_same(kept.keep(torch.tensor([0])), lm, layer, left[:1], first[:1])


@pytest.mark.parametrize("cached", [True, False])
def test_nothing_before(name: str, cached: bool) -> None:
    """Every text starts at its first token."""
    lm = language_model(name)
    texts = texts_of(lm)
    suffix = Suffix(lm, texts, 1, [0] * len(texts), cached=cached)
    assert suffix.states.shape[1] == max(len(text.ids) for text in texts) - 1
    assert_same(suffix, lm, 1, texts, [0] * len(texts))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_a_text_as_long_as_the_model_can_take(name: str) -> None:
    limit = "n_positions" if name == "gpt2" else "max_position_embeddings"
    lm = language_model(name, dtype=torch.float64, **{limit: 12})
    texts = [Encoded(tuple(range(3, 15)), 11, 9), Encoded(tuple(range(5, 15)), 3, 1)]
    assert_same(Suffix(lm, texts, 1), lm, 1, texts, [9, 1])


def test_the_bundled_model() -> None:
    lm = errata.load("atlas", dtype="float64")
    texts = texts_of(lm)
    starts = [int(text.subject_last or 0) for text in texts]
    for layer in range(len(lm.anatomy.layers)):
        suffix = Suffix(lm, texts, layer)
        assert suffix.cached
        assert_same(suffix, lm, layer, texts, starts)


def forgets(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return keys, values  # fewer than the mask has places for


def blurs(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.cat([0.9 * self.keys, keys], -2), torch.cat([self.values, values], -2)


@pytest.mark.parametrize("wrong", [forgets, blurs])
def test_a_model_that_does_not_go_on_from_a_cache_runs_whole(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, layer = language_model("llama", dtype=torch.float64), 1
    monkeypatch.setattr(module._Prefix, "update", wrong)
    texts = texts_of(lm)
    starts = starts_of(texts)
    suffix, before = Suffix(lm, texts, layer, starts), state_of(lm)
    assert not suffix.cached
    assert_same(suffix, lm, layer, texts, starts)
    assert_untouched(lm, before)


def test_the_probe_runs_once_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "_probe", lambda lm, layer: bool(asked.append(layer)) or True)
    lm = language_model("llama")
    for layer in (2, 2, 1, 2):
        Suffix(LanguageModel(lm.model, lm.tokenizer), texts_of(lm), layer)
    assert asked == [2, 1]
    lm.model.to(torch.float64)
    Suffix(lm, texts_of(lm), 2)
    assert asked == [2, 1, 2]


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_is_not_there(layer: int) -> None:
    lm = language_model("llama")
    with pytest.raises(ModelError, match="layers 0 to 3"):
        Suffix(lm, texts_of(lm), layer)


def test_what_cannot_be_resumed_is_refused() -> None:
    lm = language_model("llama")
    lm.model.config.num_kv_shared_layers = 2
    with pytest.raises(ModelError, match="run the whole model"):
        Suffix(lm, texts_of(lm), 2)


def test_starts_that_do_not_fit() -> None:
    lm = language_model("llama")
    texts = texts_of(lm)
    with pytest.raises(ValueError, match="choose one from 0 to"):
        Suffix(lm, texts, 1, [0, 0, 0, texts[3].prompt_length])
    with pytest.raises(ValueError, match="choose one from 0 to"):
        Suffix(lm, texts, 1, [0, -1, 0, 0])
    with pytest.raises(ValueError, match="4 texts but 1 starts"):
        Suffix(lm, texts, 1, [0])
    with pytest.raises(ValueError, match="no subject to start from"):
        Suffix(lm, [encode(lm.tokenizer, "Here is", "there")], 1)


def test_states_of_another_shape_and_an_empty_batch_are_refused() -> None:
    lm = language_model("llama")
    suffix = Suffix(lm, texts_of(lm), 1)
    with pytest.raises(ModelError, match="cached states"):
        suffix.logits(suffix.states[:, :-1])
    with pytest.raises(ValueError, match="keep at least one"):
        suffix.keep(torch.zeros(len(suffix), dtype=torch.bool))
