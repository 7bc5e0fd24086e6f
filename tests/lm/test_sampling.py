"""Sampled continuations: the right distribution, a seed for each text, and no influence from the texts beside it."""

from __future__ import annotations

import pytest
import torch

from errata.lm import ModelError
from errata.lm.sampling import Sampling
from tests.families import POSITIONS, SENTENCES, language_model

PROMPTS = ["Lyon lies in", "The capital of Japan is", SENTENCES[1], "Question: where does Lyon lie?"]
SEEDS = [3, 1, 4, 1]


def test_the_samples_follow_the_softmax_at_the_temperature() -> None:
    logits, temperature, n = torch.tensor([1.0, 0.0, -0.5, 2.0]), 0.7, 4000
    drawn = Sampling(temperature, range(n), torch.device("cpu"))(torch.zeros(n, 1), logits.expand(n, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / n
    expected = torch.softmax(logits / temperature, -1)
    assert (shares - expected).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard deviations, at the widest


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    lm = language_model("llama", dtype=torch.float64)
    together = lm.generate(PROMPTS, 12, False, temperature=1.0, seeds=SEEDS)
    assert together == lm.generate(PROMPTS, 12, False, temperature=1.0, seeds=SEEDS)
    assert together == [lm.generate([p], 12, False, temperature=1.0, seeds=[s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together == lm.generate(PROMPTS[::-1], 12, False, 2, temperature=1.0, seeds=SEEDS[::-1])[::-1]
    others = lm.generate(PROMPTS, 12, False, temperature=1.0, seeds=[s + 10 for s in SEEDS])
    assert all(one != other for one, other in zip(together, others, strict=True))


def test_greedy_is_the_limit_of_temperature_zero() -> None:
    lm = language_model("llama")
    greedy = lm.generate(PROMPTS, 12, False)
    assert lm.generate(PROMPTS, 12, False, temperature=1e-6, seeds=SEEDS) == greedy
    assert lm.generate(PROMPTS, 12, False, temperature=1.0, seeds=SEEDS) != greedy


def test_a_long_neighbour_does_not_cut_a_short_text() -> None:
    lm = language_model("gpt2")
    lm.tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id = None
    short, long = "Lyon", SENTENCES[1] * 3
    assert lm.generate([short, long], POSITIONS, False)[0] == lm.generate([short], POSITIONS, False)[0]
    with pytest.raises(ModelError, match="too long"):
        lm.generate([short, long * 4], 4)


def test_ids_are_taken_as_they_are() -> None:
    lm = language_model("llama", bos=True)
    ids = lm.tokenizer("Lyon lies in").input_ids
    assert ids[0] == 0  # with the special prefix, that the text gets by itself
    assert lm.generate([ids, "Lyon lies in"], 8, False) == lm.generate(["Lyon lies in"] * 2, 8, False)
    assert lm.generate([ids[1:]], 8, False) != lm.generate([ids], 8, False)


def test_what_sampling_needs() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="temperature is -1"):
        lm.generate(["Lyon"], 4, temperature=-1)
    for seeds in (None, [1, 2]):
        with pytest.raises(ValueError, match="a seed for each of the 1 prompts"):
            lm.generate(["Lyon"], 4, temperature=1.0, seeds=seeds)
    assert lm.generate([], 4, temperature=1.0, seeds=[]) == []
