"""Noise against slow loops with dense matrices in float64, straight from eq. 12 to 15 of DeltaEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from errata.edits.delta import Delta, DenseDelta, LowRankDelta, Replacement
from errata.edits.edit import Edit
from errata.facts import Fact
from errata.lm import LanguageModel
from errata.lm.capture import capture
from errata.metrics import noise
from errata.metrics.noise import Trace, keys_of
from tests.families import FAMILIES, HIDDEN, INNER, language_model

GPT2, LLAMA = "transformer.h.1.mlp.c_proj", "model.layers.1.mlp.down_proj"  # Conv1D [in, out], Linear [out, in]
Step = tuple[list[Delta], Tensor]


def rank(path: str, facts: int, seed: int) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(path, torch.randn(HIDDEN, facts, generator=generator), torch.randn(facts, INNER, generator=generator))


def dense(path: str, seed: int) -> DenseDelta:
    shape = (INNER, HIDDEN) if path == GPT2 else (HIDDEN, INNER)
    return DenseDelta(path, torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def keys(facts: int, seed: int) -> Tensor:
    return torch.randn(facts, INNER, generator=torch.Generator().manual_seed(100 + seed))


def edit(lm: LanguageModel, deltas: Sequence[Delta], facts: int) -> Edit:
    return Edit(lm, deltas, [Fact("{} is", f"S{i}", "T") for i in range(facts)], {"name": "test"})


def traced(lm: LanguageModel, path: str, steps: Sequence[Step]) -> Trace:
    trace = Trace()
    for deltas, k in steps:
        trace.add(edit(lm, deltas, len(k)), {path: k})
    return trace


def dense_of(deltas: Sequence[Delta]) -> Tensor:
    """Their sum [out, in], by the edits' own rule."""
    total = torch.zeros(HIDDEN, INNER, dtype=torch.float64)
    for delta in deltas:
        if isinstance(delta, LowRankDelta):
            total += delta.left.double() @ delta.right.double()
        else:
            total += (delta.tensor.T if delta.path == GPT2 else delta.tensor).double()
    return total


def by_definition(steps: Sequence[Step], extra: Sequence[Delta] = ()) -> list[float]:
    """Eq. 12 for every fact."""
    total = sum((dense_of(deltas) for deltas, _ in steps), dense_of(extra))
    return [((total @ k.double()).norm() ** 2 - (dense_of(deltas) @ k.double()).norm() ** 2).item() for deltas, ks in steps for k in ks]


@pytest.fixture(params=[GPT2, LLAMA])
def where(request: pytest.FixtureRequest) -> tuple[LanguageModel, str]:
    return language_model("gpt2" if request.param == GPT2 else "llama"), request.param


@pytest.mark.parametrize("rows", [2, 512])
def test_all_kinds_of_edits_in_one_sequence(where: tuple[LanguageModel, str], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "ROWS", rows)
    lm, path = where
    steps: list[Step] = [
        ([rank(path, 1, 0)], keys(1, 0)),
        ([rank(path, 3, 1)], keys(3, 1)),  # a batch
        ([dense(path, 2)], keys(1, 2)),
        ([], keys(2, 3)),  # nothing written
        ([rank(path, 2, 4), dense(path, 5), rank(path, 1, 6)], keys(1, 4)),
        ([dense(path, 7)], keys(2, 5)),
    ]
    trace = Trace()
    for n, (deltas, k) in enumerate(steps, 1):
        trace.add(edit(lm, deltas, len(k)), {path: k})
        found = trace.measure()[path]  # measured between the edits, too
        expected = by_definition(steps[:n])
        assert found.per_fact == pytest.approx(expected) and found.noise == pytest.approx(sum(expected) / len(expected))
        assert found.edits == n and (found.k_beta is None) == (n != 2)  # one fact, then one rank a fact, then not
    extra: list[Delta] = [rank(path, 4, 8), dense(path, 9), rank("elsewhere", 1, 10)]
    assert trace.measure(extra)[path].per_fact == pytest.approx(by_definition(steps, extra[:2]))
    assert trace.measure()[path] == found  # looking changes nothing
    assert found.to_dict() == {"noise": found.noise, "k_beta": None, "edits": 6}


@pytest.mark.parametrize("rows", [3, 512])
def test_one_rank_a_fact_as_double_sum_and_its_activations(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eq. 14 and 15, term by term."""
    monkeypatch.setattr(noise, "ROWS", rows)
    lm, count = language_model("llama"), 7
    steps: list[Step] = [([rank(LLAMA, 1, i)], keys(1, i)) for i in range(count)]
    alpha = [delta.left[:, 0].double() for (delta,), _ in steps if isinstance(delta, LowRankDelta)]
    beta = [delta.right[0].double() for (delta,), _ in steps if isinstance(delta, LowRankDelta)]
    k = [one[0].double() for _, one in steps]
    every = range(count)
    double_sums = [
        sum((k[e] @ beta[i]) * (alpha[i] @ alpha[j]) * (beta[j] @ k[e]) for i in every for j in every if (i, j) != (e, e)) for e in every
    ]
    found = traced(lm, LLAMA, steps).measure()[LLAMA]
    assert found.per_fact == pytest.approx([float(value) for value in double_sums])
    pairs = [float(k[i] @ beta[j]) for i in every for j in every if i != j]
    assert found.k_beta == pytest.approx(sum(pairs) / (count * (count - 1)))


def test_facts_of_one_edit_are_no_noise_to_each_other_but_pairs() -> None:
    lm, batch = language_model("llama"), rank(LLAMA, 3, 0)
    found = traced(lm, LLAMA, [([batch], keys(3, 0))]).measure()[LLAMA]
    assert found.per_fact == pytest.approx([0, 0, 0], abs=1e-9)
    g = keys(3, 0).double() @ batch.right.double().T
    assert found.k_beta == pytest.approx(((g.sum() - g.trace()) / 6).item())


def test_a_sequence_goes_on_from_what_was_kept(where: tuple[LanguageModel, str]) -> None:
    lm, path = where
    steps: list[Step] = [([rank(path, 1, 0)], keys(1, 0)), ([dense(path, 1)], keys(1, 1)), ([rank(path, 2, 2)], keys(2, 2))]
    whole = traced(lm, path, steps)
    first = traced(lm, path, steps[:2])
    kept, noted = load(save(first.state_dict())), first.measure()
    resumed = Trace()
    resumed.load_state_dict(kept)
    assert resumed.measure() == noted
    resumed.add(edit(lm, steps[2][0], 2), {path: steps[2][1]})
    assert resumed.measure() == whole.measure()
    again = Trace()
    again.load_state_dict(kept)  # what was kept has not grown along
    assert again.measure() == noted
    assert Trace().measure() == {} and Trace().state_dict() == {}


def test_several_weights_are_kept_apart() -> None:
    lm, other = language_model("llama"), "model.layers.2.mlp.down_proj"
    trace = Trace()
    trace.add(edit(lm, [rank(LLAMA, 1, 0), rank(other, 1, 1)], 1), {LLAMA: keys(1, 0), other: keys(1, 1)})
    trace.add(edit(lm, [rank(other, 1, 2)], 1), {other: keys(1, 2)})
    found = trace.measure()
    assert (found[LLAMA].edits, found[other].edits) == (1, 2) and found[LLAMA].noise == pytest.approx(0, abs=1e-9)
    assert found[other].per_fact == pytest.approx(by_definition([([rank(other, 1, 1)], keys(1, 1)), ([rank(other, 1, 2)], keys(1, 2))]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from(["alphas and keys", "alphas", "keys"]))
def test_orthogonal_edits_make_no_noise(seed: int, count: int, orthogonal: str) -> None:
    """Keys that activate no other edit leave none; orthogonal α alone leave that of wrong activations, which is then positive."""
    lm, generator = language_model("llama", dtype=torch.float64), torch.Generator().manual_seed(seed)
    alphas, betas = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (HIDDEN, INNER))
    if "alphas" in orthogonal:
        alphas = torch.linalg.qr(alphas.T).Q.T
    k = torch.linalg.pinv(betas).T if "keys" in orthogonal else torch.randn(count, INNER, generator=generator, dtype=torch.float64)
    steps: list[Step] = [([LowRankDelta(LLAMA, alphas[i, :, None], betas[i, None])], k[i, None]) for i in range(count)]
    found = traced(lm, LLAMA, steps).measure()[LLAMA]
    if "keys" in orthogonal:
        assert found.per_fact == pytest.approx([0] * count, abs=1e-6) and (found.k_beta is None or abs(found.k_beta) < 1e-6)
    else:
        activations = (k @ betas.T).fill_diagonal_(0)
        assert found.per_fact == pytest.approx(activations.square().sum(-1).tolist())


def test_what_does_not_fit_is_refused_and_not_noted() -> None:
    lm = language_model("llama")
    trace = Trace()
    wrong: list[tuple[Delta, Mapping[str, Tensor], str]] = [
        (rank(LLAMA, 1, 0), {}, "no keys for it"),
        (rank(LLAMA, 1, 0), {LLAMA: keys(2, 0)}, r"must be \[1, 40\], a row for each fact"),
        (rank(LLAMA, 1, 0), {LLAMA: keys(1, 0)[:, :3]}, r"must be \[1, 40\].*got \[1, 3\]"),
        (LowRankDelta(LLAMA, torch.ones(3, 1), torch.ones(1, INNER)), {LLAMA: keys(1, 0)}, "does not fit"),
        (Replacement(LLAMA, torch.ones(HIDDEN, INNER)), {LLAMA: keys(1, 0)}, "before it is folded"),
    ]
    for delta, given_keys, problem in wrong:
        with pytest.raises(ValueError, match=problem):
            trace.add(edit(lm, [delta], 1), given_keys)
    assert trace.measure() == {}


FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("Marie Curie was born in", "marie curie", "Paris"),
    Fact("The capital of Japan is", "", "Lyon"),  # no subject
    Fact("It is the", "Tokyo", "town"),  # not in it
]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_what_enters_at_the_subjects_last_token(family: str) -> None:
    lm = language_model(family, dtype=torch.float64)
    paths = [lm.anatomy.mlp_down[1], lm.anatomy.mlp_down[3], lm.anatomy.attn_out[2]]
    ends = ["The capital of France", "Marie Curie", "The capital of Japan is", "It is the"]
    for batch_size in (1, 3):
        found = keys_of(lm, FACTS, paths, batch_size)
        assert list(found) == paths
        for i, (fact, end) in enumerate(zip(FACTS, ends, strict=True)):
            encoding = lm.tokenizer(fact.text, return_offsets_mapping=True)
            place = max(n for n, (low, high) in enumerate(encoding.offset_mapping) if low < len(end) and high > low)
            with torch.no_grad(), capture(lm.model, {path: path for path in paths}, inputs=True) as seen:
                lm.model(torch.tensor([encoding.input_ids]))
            for path in paths:
                assert torch.allclose(found[path][i], seen[path][0, place], atol=1e-9)
