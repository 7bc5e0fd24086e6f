"""The shared parts of locate-then-edit, against slow and obvious references."""

from __future__ import annotations

import pytest
import torch

from errata.bench.knowledge import encode_fact, own_write, rank_one
from errata.edits import Edit, LowRankDelta
from errata.facts import Fact
from errata.lm.capture import capture, submodule
from errata.methods.locate.value import find_values
from errata.statistics.moments import second_moments
from tests.families import SENTENCES, language_model

FACTS = (Fact("The capital of {} is", "France", "Tokyo"), Fact("{} was born in", "Marie Curie", "Lyon, in France"))
PREFIXES = ("", "Question: where does Lyon lie? ")


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "olmo2"])  # Gemma 2 in float64 has NaN at padding
def test_values_equal_one_fact_at_a_time_with_full_forward_passes(family: str) -> None:
    """δ by plain Adam on δ, whole model, one fact, one context at a time, in float64."""
    layer, steps, lr, decay, clamp = 1, 6, 0.3, 0.1, 2.0
    lm = language_model(family, dtype=torch.float64)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    found = find_values(
        lm, layer, [[encode_fact(lm, f, p) for p in PREFIXES] for f in FACTS], steps=steps, lr=lr, decay=decay, clamp=clamp, stop=0
    )
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
    module = submodule(lm.model, lm.anatomy.mlp_down[layer])
    for i, fact in enumerate(FACTS):
        contexts = [encode_fact(lm, fact, p) for p in PREFIXES]
        delta = torch.zeros(lm.anatomy.hidden_size, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=lr)

        def nll(delta: torch.Tensor, encoded: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            kept = {}

            def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                flat = output.reshape(-1, output.shape[-1])
                kept["v"], kept["k"] = flat[encoded.subject_last].detach(), args[0].reshape(-1, args[0].shape[-1])[encoded.subject_last]  # type: ignore[attr-defined]
                mask = torch.zeros(len(flat), 1, dtype=flat.dtype)
                mask[encoded.subject_last] = 1  # type: ignore[attr-defined]
                return (flat + mask * delta).reshape(output.shape)

            handle = module.register_forward_hook(add)
            logits = lm.model(input_ids=torch.tensor([encoded.ids]), use_cache=False).logits[0]  # type: ignore[attr-defined]
            handle.remove()
            wanted = torch.tensor(encoded.target_ids)  # type: ignore[attr-defined]
            rows = logits[encoded.prompt_length - 1 : len(encoded.ids) - 1]  # type: ignore[attr-defined]
            return torch.nn.functional.cross_entropy(rows, wanted), kept["v"], kept["k"]

        base = nll(torch.zeros_like(delta), contexts[0])[1]
        keys = torch.stack([nll(torch.zeros_like(delta), c)[2] for c in contexts]).mean(0)
        for _ in range(steps):
            adam.zero_grad()
            loss = torch.stack([nll(delta, c)[0] for c in contexts]).mean() + decay * (delta.norm() / base.norm()) ** 2
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta.mul_(min(1.0, float(clamp * base.norm() / delta.norm())))
        torch.testing.assert_close(found.delta[i], delta.detach(), atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(found.base[i], base)
        torch.testing.assert_close(found.keys[i], keys.detach())
        mean_nll = nll(delta.detach(), contexts[0])[0].detach()
        assert found.probability[i].item() == pytest.approx(float((-mean_nll * len(contexts[0].target_ids)).exp()), rel=1e-6)


def test_a_finished_fact_leaves_its_delta_alone() -> None:
    lm = language_model("llama")
    rows = [[encode_fact(lm, f)] for f in FACTS]
    both = find_values(lm, 1, rows, steps=40, lr=0.5, stop=1.0)
    alone = find_values(lm, 1, rows[:1], steps=40, lr=0.5, stop=1.0)
    torch.testing.assert_close(both.delta[:1], alone.delta, atol=1e-5, rtol=1e-4)


def test_values_refuse_ragged_contexts() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="same number of contexts"):
        find_values(lm, 1, [[encode_fact(lm, FACTS[0])], [encode_fact(lm, FACTS[1])] * 2])


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
    found = find_values(lm, layer, [[encode_fact(lm, f)] for f in FACTS], steps=5, lr=0.3)
    draw = torch.randn(200, lm.anatomy.key_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = draw.T @ draw / 200
    left, right = rank_one(lm, layer, found, moment)
    path = lm.anatomy.mlp_down[layer]
    module = submodule(lm.model, path)
    encoded = [encode_fact(lm, f) for f in FACTS]
    with own_write(lm, layer, batch := lm.batch(encoded), left, right), torch.no_grad():
        together = lm.target_logits(batch)
    for i, fact in enumerate(FACTS):
        edit = Edit(lm, [LowRankDelta(path, left[i, :, None], right[i, None])], [fact], {"name": "test"})
        other = draw[0] - (draw[0] @ right[i]) / (found.keys[i] @ right[i]) * found.keys[i]
        with torch.no_grad():
            unmoved = module(other)
            with edit.applied_():
                torch.testing.assert_close(module(found.keys[i]), found.base[i] + found.delta[i])
                torch.testing.assert_close(module(other), unmoved)
                alone = lm.target_logits(lm.batch(encoded))[i]
        torch.testing.assert_close(together[i], alone)
