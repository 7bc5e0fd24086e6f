"""The shared parts of locate-then-edit, against slow and obvious references."""

from __future__ import annotations

import pytest
import torch

from errata.bench.knowledge import own_write, rank_one
from errata.edits import Edit, LowRankDelta
from errata.facts import Fact, FactError
from errata.lm.capture import capture, submodule
from errata.methods.locate.contexts import Request, encode_fact, prefixes, request
from errata.methods.locate.sweep import Sweep
from errata.methods.locate.value import Search, find_values
from errata.objectives import CrossEntropy, Overtone
from errata.statistics.moments import second_moments
from tests.families import SENTENCES, language_model

FACTS = (Fact("The capital of {} is", "France", "Tokyo"), Fact("{} was born in", "Marie Curie", "Lyon, in France"))
PREFIXES = ("Question: where does Lyon lie? ",)


def asked(lm: object, prefixes: tuple[str, ...] = PREFIXES) -> list[Request]:
    return [request(lm, fact, prefixes) for fact in FACTS]  # type: ignore[arg-type]


class Plain:
    """One text, the whole model, and δ added to the MLP's output at the subject's last token: nothing cached, nothing shared."""

    def __init__(self, lm: object, layer: int) -> None:
        self.lm, self.module = lm, submodule(lm.model, lm.anatomy.mlp_down[layer])  # type: ignore[attr-defined]
        self.block = submodule(lm.model, lm.anatomy.layers[layer])  # type: ignore[attr-defined]

    def __call__(self, text: object, delta: torch.Tensor) -> torch.Tensor:
        """Logits at the target's positions; keeps output `v`, key `k` and the layer's output `h` at the subject."""
        place = text.subject_last  # type: ignore[attr-defined]

        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            flat = output.reshape(-1, output.shape[-1])
            self.v, self.k = flat[place].detach(), args[0].reshape(-1, args[0].shape[-1])[place].detach()
            mask = torch.zeros(len(flat), 1, dtype=flat.dtype)
            mask[place] = 1
            return (flat + mask * delta).reshape(output.shape)

        def keep(module: torch.nn.Module, args: object, output: object) -> None:
            self.h = (output[0] if isinstance(output, tuple) else output)[0, place].detach()

        handles = [self.module.register_forward_hook(add), self.block.register_forward_hook(keep)]
        logits = self.lm.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()
        return logits[text.prompt_length - 1 : len(text.ids) - 1]  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("objective", [CrossEntropy(reduction="mean"), Overtone(epsilon=1e-6)], ids=lambda o: o.name)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "olmo2"])  # Gemma 2 in float64 has NaN at padding
def test_values_equal_one_fact_at_a_time_with_full_forward_passes(family: str, objective: CrossEntropy | Overtone) -> None:
    """δ by plain Adam on δ, whole model, one fact, one context at a time, in float64, with KL, decay, projector and clamp."""
    layer, steps, lr, decay, clamp, kl = 1, 6, 0.3, 0.1, 2.0, 0.5
    lm = language_model(family, dtype=torch.float64)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    requests, plain = asked(lm), Plain(lm, layer)
    sweep = Sweep(lm, requests, [layer])
    away = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q  # the projector's

    def free(x: torch.Tensor, facts: torch.Tensor | None = None) -> torch.Tensor:
        return x - (x @ away) @ away.T

    found = find_values(lm, layer, requests, sweep.reached, Search(steps, lr, decay, clamp, kl, stop=0), objective, free)
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
    assert found.steps.tolist() == [steps, steps] and len(found.losses) == steps + 1
    for i, one in enumerate(requests):
        delta = torch.zeros(lm.anatomy.hidden_size, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=lr)

        def loss(delta: torch.Tensor, text: object) -> torch.Tensor:
            logits, wanted = plain(text, delta)[None], torch.tensor([text.target_ids])  # type: ignore[attr-defined]
            return objective(logits, wanted, torch.ones_like(wanted, dtype=torch.bool))[0]

        keys, outputs = [], []
        for text in one.contexts:
            loss(torch.zeros_like(delta), text)
            keys.append(plain.k)
            outputs.append(plain.v)
            reached = plain.h if len(outputs) == 1 else reached  # noqa: F821
        torch.testing.assert_close(sweep.keys[i], torch.stack(keys))
        torch.testing.assert_close(sweep.outputs[i], torch.stack(outputs))
        base = reached if lm.anatomy.writes_straight else outputs[0]
        torch.testing.assert_close(sweep.reached[i], base)
        original = torch.log_softmax(plain(one.essence, torch.zeros_like(delta))[0], -1).detach()
        for _ in range(steps):
            adam.zero_grad()
            now = torch.log_softmax(plain(one.essence, delta)[0], -1)
            total = torch.stack([loss(delta, text) for text in one.contexts]).mean() + decay * delta.norm() / base.norm() ** 2
            (total + kl * (now.exp() * (now - original)).sum()).backward()
            adam.step()
            with torch.no_grad():
                delta.copy_(free(delta))
                delta.mul_(min(1.0, float(clamp * base.norm() / delta.norm())))
        torch.testing.assert_close(found.delta[i], delta.detach(), atol=1e-7, rtol=1e-5)
        logits = plain(one.contexts[0], delta.detach())
        wanted = torch.tensor(one.contexts[0].target_ids)
        probability = torch.log_softmax(logits.detach(), -1)[range(len(wanted)), wanted].sum().exp()
        assert found.probability[i].item() == pytest.approx(float(probability), rel=1e-5)


def test_a_finished_fact_leaves_the_batch_and_keeps_its_delta() -> None:
    lm = language_model("llama")
    search = Search(steps=40, lr=0.5, decay=1e-3, clamp=4.0, kl=0.0625, stop=7.2)  # random weights: much is not to be had
    requests = asked(lm)
    base = Sweep(lm, requests, [1]).reached
    both = find_values(lm, 1, requests, base, search, CrossEntropy(reduction="mean"))
    assert both.steps[1] < both.steps[0] < 40, "the test needs a fact that is done before the other"
    for i in range(2):
        alone = find_values(lm, 1, requests[i : i + 1], base[i : i + 1], search, CrossEntropy(reduction="mean"))
        torch.testing.assert_close(both.delta[i : i + 1], alone.delta, atol=1e-5, rtol=1e-4)
        assert both.steps[i] == alone.steps[0]


def test_a_likely_enough_target_ends_the_search() -> None:
    lm = language_model("llama")
    requests = asked(lm)[:1]
    base = Sweep(lm, requests, [1]).reached
    found = find_values(lm, 1, requests, base, Search(60, 0.5, 0.0, 10.0, stop=0.0, enough=1e-6), CrossEntropy(reduction="mean"))
    assert 0 < found.steps[0] < 60 and found.probability[0] > 1e-6


def test_values_refuse_ragged_contexts() -> None:
    lm = language_model("llama")
    ragged = [request(lm, FACTS[0], ()), request(lm, FACTS[1], PREFIXES)]
    with pytest.raises(ValueError, match="same number of contexts"):
        find_values(lm, 1, ragged, torch.ones(2, 16), Search(1, 0.1, 0, 1), CrossEntropy())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "falcon", "opt"])
def test_a_sweep_sees_the_model_as_it_is_after_each_write(family: str) -> None:
    """Keys and what is reached at the last layer, against real edits of the weights and whole runs."""
    lm = language_model(family, dtype=torch.float64)
    layers, requests, draw = [0, 1, 2], asked(lm), torch.Generator().manual_seed(0)
    sweep, edits = Sweep(lm, requests, layers), []
    first = sweep.keys
    assert torch.equal(sweep.before[0], first)
    for layer in layers:
        for i, one in enumerate(requests):
            for c, text in enumerate(one.contexts):
                plain = Plain(lm, layer)
                plain(text, torch.zeros(16, dtype=torch.float64))
                torch.testing.assert_close(sweep.keys[i, c], plain.k)
            last = Plain(lm, layers[-1])
            last(one.contexts[0], torch.zeros(16, dtype=torch.float64))
            torch.testing.assert_close(sweep.reached[i], last.h)
        left, right = torch.randn(16, 2, generator=draw).double(), torch.randn(2, lm.anatomy.key_size, generator=draw).double()
        sweep.write(lambda k, left=left, right=right: (k @ right.T) @ left.T)  # type: ignore[misc]
        edits.append(Edit(lm, [LowRankDelta(lm.anatomy.mlp_down[layer], left, right)], [], {"name": "test"}))
        edits[-1].apply()
    again = Sweep(lm, requests, layers)
    assert torch.equal(again.keys, first), "the lowest layer's keys know nothing of what is written at or above it"
    for edit in edits:
        edit.revert()


def test_prefixes_are_the_models_own_and_the_same_again() -> None:
    lm = language_model("llama")
    made = prefixes(lm, 3, 6)
    assert len(made) == 3 and all(text.endswith(". ") for text in made)
    assert prefixes(lm, 3, 6) is made, "once for each model"
    assert prefixes(language_model("llama"), 3, 6) == made
    assert prefixes(lm, 3, 6, seed=1) != made


def test_a_fact_that_cannot_be_located_says_so() -> None:
    lm = language_model("llama")
    with pytest.raises(FactError, match="names no subject"):
        request(lm, Fact("The capital of France is", "", "Lyon"), ())
    with pytest.raises(FactError, match="does not occur"):
        request(lm, Fact("The capital of France is", "Spain", "Lyon"), ())


def test_second_moments_equal_the_whole_data_computation() -> None:
    lm = language_model("llama", dtype=torch.float64)
    together = second_moments(lm, SENTENCES, [0, 2], batch_size=3)
    assert torch.allclose(second_moments(lm, SENTENCES, [3])[3], second_moments(lm, SENTENCES, [3, 0])[3])  # the last layer too
    for layer, moment in together.items():
        rows = []
        for text in SENTENCES:
            with torch.no_grad(), capture(lm.model, {"k": lm.anatomy.mlp_down[layer]}, inputs=True) as seen:
                lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
            rows.append(seen["k"][0])
        keys = torch.cat(rows)
        torch.testing.assert_close(moment, keys.T @ keys / len(keys), atol=1e-12, rtol=1e-9)
    with pytest.raises(ValueError, match="no tokens"):
        second_moments(lm, ["  "], [0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_the_write_is_romes_and_rows_can_have_their_own(family: str) -> None:
    """(W + Δ) k = v*, Δ moves a whitened-orthogonal key by nothing, and a row with its own Δ gives what the edited model gives."""
    layer = 1
    lm = language_model(family, dtype=torch.float64)
    sweep = Sweep(lm, requests := asked(lm, ()), [layer])
    base, keys = sweep.outputs[:, 0], sweep.keys[:, 0]
    found = find_values(lm, layer, requests, base, Search(5, 0.3, 1e-3, 4.0), CrossEntropy())
    draw = torch.randn(200, lm.anatomy.key_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = draw.T @ draw / 200
    left, right = rank_one(lm, layer, keys, base + found.delta, moment)
    path = lm.anatomy.mlp_down[layer]
    module = submodule(lm.model, path)
    encoded = [encode_fact(lm, f) for f in FACTS]
    with own_write(lm, layer, batch := lm.batch(encoded), left, right), torch.no_grad():
        together = lm.target_logits(batch)
    for i, fact in enumerate(FACTS):
        edit = Edit(lm, [LowRankDelta(path, left[i, :, None], right[i, None])], [fact], {"name": "test"})
        other = draw[0] - (draw[0] @ right[i]) / (keys[i] @ right[i]) * keys[i]
        with torch.no_grad():
            unmoved = module(other)
            with edit.applied_():
                torch.testing.assert_close(module(keys[i]), base[i] + found.delta[i])
                torch.testing.assert_close(module(other), unmoved)
                alone = lm.target_logits(lm.batch(encoded))[i]
        torch.testing.assert_close(together[i], alone)
