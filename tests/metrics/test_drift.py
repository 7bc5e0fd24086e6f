"""Drift against slow float64 definitions, prompt by prompt, and what must not change it."""

from __future__ import annotations

import json
import math
import sys
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.edits.delta import LowRankDelta
from errata.edits.edit import Edit
from errata.facts import Fact
from errata.lm import LanguageModel, ModelError
from errata.lm.asking import prefacing
from errata.lm.tokens import Encoded
from errata.metrics import drift
from tests.families import HIDDEN, INNER, language_model

PROMPTS = ["The capital of France is", "Lyon", "Marie Curie was born in", "Москва столица", "the", "法国的首都是", "Pierre Curie"]


def cloud(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(lm: LanguageModel, prompt: str, layer: int) -> Tensor:
    """The state as defined: one prompt, the whole model, no batch. hidden_states[0] is the embedding's."""
    ids = torch.tensor([lm.tokenizer(prompt).input_ids])
    outputs: list[Tensor] = []
    handle = lm.model.get_submodule(lm.anatomy.layers[layer]).register_forward_hook(
        lambda _, __, output: outputs.append((output[0] if isinstance(output, tuple) else output).detach().clone())
    )
    lm.model(ids)
    handle.remove()
    return outputs[0][0, -1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon", "opt"])
@pytest.mark.parametrize("layer", [0, 2, None])
def test_states_are_those_of_the_prompt_alone(family: str, layer: int | None) -> None:
    lm = language_model(family, bos=True)
    found = drift.states(lm, PROMPTS, layer, batch_size=3)
    assert found.shape == (len(PROMPTS), HIDDEN) and found.dtype == torch.float32 and not found.requires_grad
    expected = torch.stack([alone(lm, prompt, 3 if layer is None else layer) for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_states_see_edits_and_come_back_to_the_bit() -> None:
    lm = language_model("llama")
    delta = LowRankDelta("model.layers.1.mlp.down_proj", cloud(HIDDEN, 1, 0).float(), cloud(1, INNER, 1).float())
    below, before = drift.states(lm, PROMPTS, 0), drift.states(lm, PROMPTS)
    edit = Edit(lm, [delta], [Fact("{} is", "S", "T")], {"name": "test"})
    edit.apply()
    assert not torch.equal(drift.states(lm, PROMPTS), before) and torch.equal(drift.states(lm, PROMPTS, 0), below)
    edit.revert()
    assert torch.equal(drift.states(lm, PROMPTS), before)
    assert drift.compare(before, drift.states(lm, PROMPTS))["relative_l2"] == 0.0


def test_the_last_token_is_the_last_one_whatever_stands_in_front() -> None:
    lm = language_model("llama")
    front = tuple(lm.tokenizer("Lyon lies in France.").input_ids)
    with prefacing(lm, lambda text: Encoded((*front, *text.ids), len(front) + text.prompt_length)):
        found = drift.states(lm, PROMPTS[:2], 3)
    for row, prompt in zip(found, PROMPTS[:2], strict=True):
        whole = torch.tensor([[*front, *lm.tokenizer(prompt).input_ids]])
        states = lm.model(whole, output_hidden_states=True).hidden_states
        norm = lm.model.model.norm
        torch.testing.assert_close(norm(row[None]), states[-1][0, -1:], rtol=1e-4, atol=1e-4)  # the last one is given behind the norm


def test_in_half_precision_states_are_float32() -> None:
    lm = language_model("llama", dtype=torch.bfloat16)
    assert drift.states(lm, PROMPTS[:2]).dtype == torch.float32


def test_bad_requests_say_what_to_do() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="at least one"):
        drift.states(lm, [])
    with pytest.raises(ModelError, match="layers 0 to 3, not 4"):
        drift.states(lm, PROMPTS, 4)
    with pytest.raises(ModelError, match="not -1"):
        drift.states(lm, PROMPTS, -1)
    with pytest.raises(ValueError, match="same prompts and layer"):
        drift.compare(cloud(3, 4, 0), cloud(4, 4, 0))


# The numbers


def slow_cka(x: list[list[float]], y: list[list[float]]) -> float:
    """‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖), columns centred, entry by entry."""

    def centred(rows: list[list[float]]) -> list[list[float]]:
        means = [fmean(column) for column in zip(*rows, strict=True)]
        return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]

    def squared(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(sum(p[i] * q[j] for p, q in zip(a, b, strict=True)) ** 2 for i in range(len(a[0])) for j in range(len(b[0])))

    x, y = centred(x), centred(y)
    return squared(x, y) / math.sqrt(squared(x, x) * squared(y, y))


def slow(before: Tensor, after: Tensor) -> dict[str, float]:
    x, y = before.tolist(), after.tolist()

    def size(v: list[float]) -> float:
        return math.sqrt(sum(value**2 for value in v))

    moved = [size([q - p for p, q in zip(a, b, strict=True)]) for a, b in zip(x, y, strict=True)]
    return {
        "cosine": fmean(sum(p * q for p, q in zip(a, b, strict=True)) / (size(a) * size(b)) for a, b in zip(x, y, strict=True)),
        "relative_l2": fmean(m / size(a) for m, a in zip(moved, x, strict=True)),
        "relative_l2_whole": size(moved) / size([size(a) for a in x]),
        "cka": slow_cka(x, y),
    }


@pytest.mark.parametrize(("n", "d"), [(3, 5), (12, 4), (9, 9)])
def test_numbers_are_their_definitions(n: int, d: int) -> None:
    before = cloud(n, d, 0) + 1
    after = before + 0.3 * cloud(n, d, 1)
    found = drift.compare(before, after)
    assert found["prompts"] == n and found["left_out"] == 0
    for name, value in slow(before, after).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    json.dumps(found, allow_nan=False)


def test_resampled_numbers_are_those_of_the_resampled_prompts() -> None:
    """The interval's short way through N × N products, against the states of a resample written out."""
    before, after = cloud(10, 4, 0).numpy(), cloud(10, 4, 1).numpy()
    drawn = np.random.default_rng(3).multinomial(10, [0.1] * 10, size=6).astype(float)
    found = np.stack(drift._numbers(before, after, drawn))  # [4, R]
    for counts, column in zip(drawn.astype(int), found.T, strict=True):
        rows = np.repeat(np.arange(10), counts)
        expected = slow(torch.from_numpy(before[rows]), torch.from_numpy(after[rows]))
        assert column == pytest.approx(list(expected.values()), rel=1e-9)


seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, n=st.integers(3, 12), d=st.integers(2, 8))
def test_what_has_not_moved_says_so(seed: int, n: int, d: int) -> None:
    states = cloud(n, d, seed)
    found = drift.compare(states, states.clone())
    assert (found["cosine"], found["relative_l2"], found["relative_l2_whole"], found["cka"]) == (1.0, 0.0, 0.0, 1.0)
    assert found["intervals"] == {"cosine": [1.0, 1.0], "relative_l2": [0.0, 0.0], "relative_l2_whole": [0.0, 0.0], "cka": [1.0, 1.0]}


@settings(deadline=None, max_examples=25)
@given(seed=seeds, n=st.integers(4, 12), d=st.integers(2, 6), scale=st.floats(0.01, 100))
def test_cka_does_not_see_turns_scales_and_moves(seed: int, n: int, d: int, scale: float) -> None:
    before, after = cloud(n, d, seed), cloud(n, d, seed + 1)
    turn, _ = torch.linalg.qr(cloud(d, d, seed + 2))
    moved = scale * (after @ turn) + 3 * cloud(1, d, seed + 3)
    one, other = drift.compare(before, after), drift.compare(before, moved)
    assert other["cka"] == pytest.approx(one["cka"], abs=2e-6)
    assert other["intervals"]["cka"] == pytest.approx(one["intervals"]["cka"], abs=2e-6)
    assert drift.compare(before, scale * before @ turn)["cka"] == pytest.approx(1.0, abs=2e-6)
    assert drift.compare(before, scale * before)["cosine"] == 1.0  # nor does the cosine see scales
    assert drift.compare(after, before)["cka"] == pytest.approx(one["cka"], abs=2e-6)


def test_more_noise_is_more_drift() -> None:
    before, noise = cloud(50, 8, 0), cloud(50, 8, 1)
    rows = [drift.compare(before, before + size * noise) for size in (0.01, 0.1, 1.0)]
    for name in ("relative_l2", "relative_l2_whole"):
        assert rows[0][name] < rows[1][name] < rows[2][name]
    for name in ("cosine", "cka"):
        assert rows[0][name] > rows[1][name] > rows[2][name]


def test_intervals_hold_what_they_should_about_as_often_as_they_should() -> None:
    """Of clouds drawn anew; the truth is the number of a very large cloud."""

    def pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
        before = cloud(n, 5, seed)
        return before, before + 0.5 * cloud(n, 5, seed + 1)

    truth = drift._numbers(*(part.numpy() for part in pair(2000, 77)), np.ones((1, 2000)))
    held = dict.fromkeys(drift.NUMBERS, 0)
    for trial in range(60):
        found = drift.compare(*pair(80, 1000 + 2 * trial))
        for name, (value,) in zip(drift.NUMBERS, truth, strict=True):
            low, high = found["intervals"][name]
            held[name] += low <= value <= high
    assert all(share >= 0.8 * 60 for share in held.values()), held


def test_broken_states_are_left_out_and_nothing_is_none() -> None:
    before, after = cloud(6, 4, 0), cloud(6, 4, 1)
    after[1, 2], after[4, 0], before[5] = math.nan, math.inf, 0.0
    found = drift.compare(before, after)
    kept = [0, 2, 3]
    assert (found["prompts"], found["left_out"]) == (3, 3)
    assert {name: found[name] for name in drift.NUMBERS} == pytest.approx(slow(before[kept], after[kept]), abs=1e-6)
    broken = drift.measure(before, torch.full_like(after, math.nan))
    assert broken["prompts"] == 0 and broken["cka"] is None and broken["intervals"]["cosine"] == [None, None] and broken["points"] is None
    one = drift.compare(before[:1], after[:1])
    assert one["cka"] is None and one["intervals"]["cka"] == [None, None] and one["cosine"] is not None
    gone = drift.compare(before[:3], torch.zeros_like(before[:3]))
    assert gone["cosine"] == 0.0 and gone["relative_l2"] == 1.0 and gone["cka"] is None
    json.dumps([found, broken, one, gone], allow_nan=False)


# The points


def test_points_are_the_same_each_time_and_clouds_far_apart_stay_apart() -> None:
    before = cloud(30, 6, 0).float()
    after = before + 20
    one, other = drift.embed(before, after, seed=3)
    again = drift.embed(before, after, seed=3)
    assert one.shape == other.shape == (30, 2) and np.array_equal(one, again[0]) and np.array_equal(other, again[1])
    inside = max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (one, other))
    assert np.linalg.norm(one.mean(0) - other.mean(0)) > 2 * inside


def test_several_methods_share_one_plane_without_broken_prompts() -> None:
    before = cloud(12, 6, 0)
    after = {"alphaedit": before + 0.1 * cloud(12, 6, 1), "deltaedit": before.clone()}
    after["alphaedit"][2] = math.nan
    found = drift.measure_together(before, after)
    assert list(found) == ["alphaedit", "deltaedit"]
    assert found["alphaedit"]["points"]["before"] == found["deltaedit"]["points"]["before"]
    assert {len(points) for one in found.values() for points in one["points"].values()} == {11}
    assert found["deltaedit"]["prompts"] == 12 and found["deltaedit"]["cka"] == 1.0  # it is not broken itself
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_embedded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least two prompts"):
        drift.embed(cloud(1, 4, 0), cloud(1, 4, 1))
    with pytest.raises(ValueError, match="not finite"):
        drift.embed(cloud(3, 4, 0), torch.full((3, 4), math.nan))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"errata\[plots\]"):
        drift.embed(cloud(3, 4, 0), cloud(3, 4, 1))
