"""Every family keeps the same promises; each is checked against the slow and obvious way."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from errata.facts import Fact
from errata.lm.anatomy import KNOWN, _Probe, detect, find_anatomy, is_conv1d, matrix
from errata.lm.capture import add_to_output, capture
from errata.lm.errors import ModelError
from errata.lm.model import LanguageModel
from errata.lm.places import once
from errata.lm.resume import Below, from_layer, states_at
from errata.lm.tokens import Batch, Encoded, encode
from tests.families import FAMILIES, HIDDEN, LAYERS, build, language_model

FACTS = (
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} was born in", "Marie Curie", "Москва, России"),
    Fact("{}的首都是", "日本", "北京大学"),
    Fact("Where does {} lie? Far away from here, in", "Lyon", "Japan and in Zürich"),
)
APART = ("opt", "bloom")
"""Whose MLPs run everywhere: OPT's is no module, BLOOM's takes the residual too."""


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lm(name: str) -> LanguageModel:
    return language_model(name, bos=name in ("llama", "gemma2"))


def batch_of(lm: LanguageModel, facts: tuple[Fact, ...] = FACTS) -> Batch:
    return lm.batch([encode(lm.tokenizer, fact.text, fact.target, fact.subject_span) for fact in facts])


def full_logits(lm: LanguageModel, batch: Batch) -> Tensor:
    logits: Tensor = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


def state_of(lm: LanguageModel) -> tuple[object, list[Tensor]]:
    """What a context manager could leave behind: hooks, replaced methods, changed weights."""
    modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in lm.model.modules()]
    return modules, [p.detach().clone() for p in lm.model.parameters()]


def assert_untouched(lm: LanguageModel, before: tuple[object, list[Tensor]]) -> None:
    modules, weights = state_of(lm)
    assert modules == before[0]
    assert all(torch.equal(now, then) for now, then in zip(weights, before[1], strict=True))


def test_anatomy_is_the_tables(name: str, lm: LanguageModel) -> None:
    family, anatomy = FAMILIES[name], lm.anatomy
    assert anatomy.family == family.type
    assert anatomy.layers == tuple(f"{family.layers}.{i}" for i in range(LAYERS))
    assert anatomy.mlp_down == tuple(f"{layer}.{family.down}" for layer in anatomy.layers)
    assert anatomy.attn_out == tuple(f"{layer}.{family.out}" for layer in anatomy.layers)
    assert (anatomy.final_norm, anatomy.head) == (family.norm, family.head)
    assert (anatomy.writes_straight, anatomy.tied_head) == (family.straight, family.tied)
    assert anatomy.hidden_size == HIDDEN


def test_detection_alone_agrees_with_the_table(lm: LanguageModel) -> None:
    assert lm.anatomy.family in KNOWN
    probe = _Probe(lm.model, lm.anatomy.layers, lm.anatomy.head)
    found = [detect(probe, layer, HIDDEN) for layer in lm.anatomy.layers]
    assert found == list(zip(lm.anatomy.mlp_down, lm.anatomy.attn_out, strict=True))


def test_matrices_have_one_orientation_and_write_through(name: str, lm: LanguageModel) -> None:
    batch = batch_of(lm)
    for path in (lm.anatomy.mlp_down[1], lm.anatomy.attn_out[1]):
        module = lm.model.get_submodule(path)
        assert is_conv1d(module) == FAMILIES[name].conv1d
        with torch.no_grad(), capture(lm.model, {"in": path}, inputs=True) as keys, capture(lm.model, {"out": path}) as values:
            full_logits(lm, batch)
        weight = matrix(module)
        bias = module.bias if getattr(module, "bias", None) is not None else torch.zeros(HIDDEN)
        assert weight.shape == (HIDDEN, keys["in"].shape[-1])
        torch.testing.assert_close(values["out"], keys["in"] @ weight.T + bias, atol=1e-5, rtol=1e-5)
        stored = lm.anatomy.weight(lm.model, path)
        with torch.no_grad():
            matrix(module)[2, 3] = 7.0
        assert (stored[3, 2] if FAMILIES[name].conv1d else stored[2, 3]) == 7.0
    assert matrix(lm.model.get_submodule(lm.anatomy.mlp_down[0])).shape == (HIDDEN, lm.anatomy.key_size)


def test_writes_straight_is_what_happens_in_every_layer(name: str, lm: LanguageModel) -> None:
    batch = batch_of(lm)
    delta = torch.zeros(*batch.input_ids.shape, HIDDEN)
    delta[range(len(batch)), batch.subject_last] = torch.randn(len(batch), HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer, down in zip(lm.anatomy.layers, lm.anatomy.mlp_down, strict=True):
        with torch.no_grad(), capture(lm.model, {"h": layer}) as plain:
            full_logits(lm, batch)
        with torch.no_grad(), capture(lm.model, {"h": layer}) as moved, add_to_output(lm.model.get_submodule(down), delta):
            full_logits(lm, batch)
        difference = moved["h"] - plain["h"]
        assert plain["h"].shape == delta.shape
        assert torch.allclose(difference, delta, atol=1e-4) == FAMILIES[name].straight
        elsewhere = delta.abs().sum(-1) == 0
        assert difference[elsewhere].abs().max() == 0


def test_target_logits_are_those_of_each_prompt_alone(lm: LanguageModel) -> None:
    batch = batch_of(lm)
    logits = lm.target_logits(batch)
    assert logits.shape == (*batch.targets.shape, lm.model.config.vocab_size)
    assert not logits[~batch.mask].any()
    for row, fact in enumerate(FACTS):
        encoded = encode(lm.tokenizer, fact.text, fact.target)
        alone = lm.model(input_ids=torch.tensor([encoded.ids])).logits[0]
        expected = alone[encoded.prompt_length - 1 : -1]
        count = len(encoded.target_ids)
        torch.testing.assert_close(logits[row, :count], expected, atol=2e-5, rtol=1e-4)
        assert batch.targets[row, :count].tolist() == list(encoded.target_ids)
        assert batch.mask[row].tolist() == [True] * count + [False] * (batch.mask.shape[1] - count)


def test_the_head_sees_only_rows_with_a_target(lm: LanguageModel) -> None:
    batch, before = batch_of(lm), state_of(lm)
    with capture(lm.model, {"head": lm.anatomy.head}) as seen:
        lm.target_logits(batch)
    assert seen["head"].numel() == batch.mask.sum() * lm.model.config.vocab_size
    assert_untouched(lm, before)


@torch.no_grad()
def test_the_last_mlp_runs_only_where_something_is_asked_unless_someone_looks(name: str, lm: LanguageModel) -> None:
    batch, before = batch_of(lm), state_of(lm)
    path = lm.anatomy.mlp_down[-1]

    def asked(spare: bool) -> Tensor:
        return lm.rows_at(batch.positions, batch.mask, spare, input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    asked(True)  # the first time it is tried out
    module, ran = lm.model.get_submodule(path), []
    forward = module.forward
    module.forward = lambda x: ran.append(x.shape[:-1].numel()) or forward(x)
    spared, plain = asked(True), asked(False)
    with capture(lm.model, {"v": path}):
        asked(True)
    others = [lm.anatomy.layers[-1], lm.anatomy.final_norm, lm.anatomy.head]
    for other in others:
        with capture(lm.model, {"h": str(other)}, inputs=other != lm.anatomy.layers[-1]):
            asked(True)
    whole = batch.input_ids.numel()
    assert ran == [whole if name in APART else int(batch.mask.sum()), *[whole] * (2 + len(others))]
    torch.testing.assert_close(spared, plain, atol=1e-5, rtol=1e-5)
    del module.forward
    assert_untouched(lm, before)


@torch.no_grad()
def test_texts_that_begin_alike_share_the_work_of_the_mlps(name: str, lm: LanguageModel) -> None:
    asked = [
        ("The capital of France is", "Lyon"),
        ("The capital of France is", "Lyon, in France"),
        ("The capital of Japan", "is Tokyo"),
        ("Lyon", "is"),
    ]
    texts = [encode(lm.tokenizer, *text) for text in asked]
    batch, before = lm.batch(texts).without_last(), state_of(lm)
    width = batch.input_ids.shape[1]
    beginnings = {text.ids[:end] for text in texts for end in range(1, min(len(text.ids), width) + 1)}
    paths = lm.anatomy.mlp_down

    def run(layers: int) -> tuple[Tensor, list[int]]:
        ran = dict.fromkeys(paths, 0)
        forwards = {path: lm.model.get_submodule(path).forward for path in paths}

        def counted(path: str, x: Tensor) -> Tensor:
            ran[path] += x.shape[:-1].numel()
            made: Tensor = forwards[path](x)
            return made

        with once(lm, batch.input_ids, batch.attention_mask, layers):
            for path in paths:
                lm.model.get_submodule(path).forward = partial(counted, path)
            found = lm.target_logits(batch)
        for path in paths:
            del lm.model.get_submodule(path).forward
        return found, [ran[path] for path in paths]

    whole, shared = batch.input_ids.numel(), batch.input_ids.numel() if name in APART else len(beginnings)
    assert shared < whole or name in APART
    expected, ran = run(0)
    assert ran == [whole] * LAYERS
    for layers in (2, LAYERS):
        found, ran = run(layers)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        sharing = min(layers, LAYERS - 1)  # of the last one nothing but the targets' places is of use
        assert ran == [shared] * sharing + [whole] * (LAYERS - sharing)
    with capture(lm.model, {"v": paths[1]}):
        assert run(LAYERS)[1] == [shared, *[whole] * 3]
    assert_untouched(lm, before)


@pytest.mark.parametrize("down", [False, True])
@torch.no_grad()
def test_what_is_below_an_edit_is_run_once(lm: LanguageModel, down: bool) -> None:
    """And what is changed from there on is not in what is kept."""
    layer = 2
    texts = [encode(lm.tokenizer, fact.text, fact.target) for fact in FACTS]
    before, below = state_of(lm), Below(lm, layer, down)
    weight = lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[layer])
    weights = weight.clone()
    watched = (*lm.anatomy.attn_out, *lm.anatomy.mlp_down)
    everything = [path for pair in zip(lm.anatomy.attn_out, lm.anatomy.mlp_down, strict=True) for path in pair]
    rest = everything[2 * layer + (down and lm.anatomy.writes_straight) :]

    def ask(chosen: list[Encoded], below: Below | None = None) -> tuple[Tensor, set[str]]:
        batch = lm.batch(chosen).without_last()
        with capture(lm.model, {path: path for path in watched}) as ran, below.running(chosen) if below else nullcontext():
            return lm.target_logits(batch), set(ran)

    unedited, _ = ask(texts[:3])
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for edited, chosen, runs in (
        (False, texts[:3], everything),
        (True, texts[:3], rest),
        (True, [texts[2], texts[0]], rest),
        (True, texts, everything),  # one of them is new
        (False, texts, rest),
    ):
        weight.copy_(weights + change if edited else weights)
        expected, _ = ask(chosen)
        found, ran = ask(chosen, below)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        assert ran == set(runs)
        assert len(chosen) != 3 or torch.allclose(found, unedited, atol=1e-2) != edited
    assert below.nbytes >= 4 * HIDDEN * sum(len(text.ids) - 1 for text in texts)
    assert_untouched(lm, before)


def test_running_from_a_layer_on_is_exact(lm: LanguageModel) -> None:
    batch = batch_of(lm)
    with torch.no_grad():
        whole, hidden = (
            full_logits(lm, batch),
            lm.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
            ).hidden_states,
        )
        targets = lm.target_logits(batch)
    before = state_of(lm)  # only now: output_hidden_states leaves hooks of its own in the model
    for layer in range(LAYERS):
        states = states_at(lm, batch, layer)
        assert torch.equal(states, hidden[layer])
        projections = {path: path for path in lm.anatomy.mlp_down}
        with torch.no_grad(), from_layer(lm, layer, states), capture(lm.model, projections) as ran:
            assert torch.equal(full_logits(lm, batch), whole)
            assert torch.equal(lm.target_logits(batch), targets)
        assert list(ran) == [*lm.anatomy.mlp_down[layer:]]
    assert_untouched(lm, before)


def test_gradients_from_a_layer_on_are_those_of_the_whole_model(lm: LanguageModel) -> None:
    batch, layer = batch_of(lm), 2
    weight = lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[layer])
    states = states_at(lm, batch, layer)

    def gradient() -> Tensor:
        log_p = lm.target_logits(batch).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        return torch.autograd.grad(-log_p[batch.mask].sum(), weight)[0]

    whole = gradient()
    with from_layer(lm, layer, states):
        resumed = gradient()
    assert whole.abs().max() > 0
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=1e-5)


def test_generation_in_a_batch_is_generation_one_by_one(lm: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [fact.text for fact in FACTS] + ["Marie"]
    # Whatever the model's own settings say, generation is greedy.
    lm.model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, repetition_penalty=3.0)
    own = lm.model.generation_config
    with caplog.at_level(logging.WARNING):
        together = lm.generate(prompts, 8, batch_size=4)
    assert not caplog.records
    assert lm.model.generation_config is own
    assert together == [lm.generate([prompt], 8)[0] for prompt in prompts]
    assert together == [slow_greedy(lm, prompt, 8) for prompt in prompts]
    assert any(together)


def test_rows_that_have_ended_leave_the_others(lm: LanguageModel) -> None:
    """End tokens are chosen so that texts end one after the other: the rest goes on in ever smaller batches, to the same texts."""
    prompts = [fact.text[:end] for fact in FACTS for end in (None, -1, -2)]
    widths: list[int] = []
    handle = lm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs.get("input_ids", args[0] if args else None))), with_kwargs=True
    )
    written = lm._continue([encode(lm.tokenizer, prompt).ids for prompt in prompts], 8, False, None, None)
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, *(new[i % 7] for i, new in enumerate(written) if len(new) > 7)]
    widths.clear()
    asked: list[list[int]] = []

    def within(rows: list[int]) -> nullcontext[None]:
        asked.append(rows)
        return nullcontext()

    texts = lm.generate(prompts, 8, batch_size=16, within=within)
    handle.remove()
    assert texts == [slow_greedy(lm, prompt, 8) for prompt in prompts]
    assert widths[0] == len(prompts) and widths[-1] < len(prompts) and widths == sorted(widths, reverse=True)
    assert [len(rows) for rows in asked] == sorted(set(widths), reverse=True)
    assert all(set(rows) <= set(before) for before, rows in pairwise(asked))


@torch.no_grad()
def slow_greedy(lm: LanguageModel, prompt: str, steps: int) -> str:
    """No cache, no padding: the whole text again for every token."""
    ids = list(encode(lm.tokenizer, prompt).ids)
    new: list[int] = []
    for _ in range(steps):
        token = int(lm.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in lm._end_ids():
            break
        new.append(token)
        if "\n" in lm.tokenizer.decode([token]):
            break
    return str(lm.tokenizer.decode(ids + new, skip_special_tokens=True))[len(prompt) :].split("\n")[0]


def test_capture_restores_even_when_the_model_fails(lm: LanguageModel) -> None:
    batch, before = batch_of(lm), state_of(lm)
    states = states_at(lm, batch, 1)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        capture(lm.model, {"h": lm.anatomy.layers[0]}),
        add_to_output(lm.model.get_submodule(lm.anatomy.mlp_down[0]), torch.zeros(HIDDEN)),
        from_layer(lm, 1, states),
    ):
        raise RuntimeError("on purpose")
    assert_untouched(lm, before)


def test_fingerprint_is_of_the_weights(name: str, lm: LanguageModel) -> None:
    assert lm.fingerprint == language_model(name, bos=True).fingerprint
    assert lm.fingerprint != language_model(name, seed=1).fingerprint
    other = language_model(name)
    with torch.no_grad():
        other.anatomy.weight(other.model, other.anatomy.mlp_down[0])[1, 2] += 1e-3
    assert lm.fingerprint != other.fingerprint


def test_anatomy_leaves_training_mode_and_weights_alone(name: str) -> None:
    model = build(name).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_anatomy(model)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "granite"])
def test_writes_straight_holds_in_every_type(name: str, dtype: torch.dtype) -> None:
    assert language_model(name, dtype=dtype).anatomy.writes_straight == FAMILIES[name].straight


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_is_not_there(layer: int) -> None:
    lm = language_model("llama")
    with pytest.raises(ModelError, match="layers 0 to 3"):
        states_at(lm, batch_of(lm), layer)


def test_states_of_another_batch_are_refused() -> None:
    lm = language_model("llama")
    states = states_at(lm, batch_of(lm, FACTS[:1]), 2)
    with pytest.raises(ModelError, match="call with the batch they came from"), from_layer(lm, 2, states):
        lm.target_logits(batch_of(lm))
