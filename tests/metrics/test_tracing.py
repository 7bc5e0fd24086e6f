"""Causal tracing: restoring everything restores the answer, and its picture is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata.facts import Fact
from errata.metrics.tracing import PLACES, trace
from errata.report.tracing import draw
from tests.families import LAYERS, language_model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_last_layers_last_token_carries_the_answer(family: str, tmp_path: Path) -> None:
    """Whatever was corrupted: the state that the head reads decides alone."""
    lm = language_model(family)
    facts = [Fact("The capital of {} is", "France", "Paris"), Fact("{} was born in", "Marie Curie", "Warsaw")]
    before = torch.random.get_rng_state()
    found = trace(lm, facts)
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.restored.shape == (LAYERS, len(PLACES))
    assert found.restored[-1, PLACES.index("last prompt token")].item() == pytest.approx(found.clean, rel=1e-4)
    assert found.restored[-1, PLACES.index("first subject token")].item() == pytest.approx(found.corrupted, rel=1e-4)
    draw(found, tmp_path / "trace.png", "a random model")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
