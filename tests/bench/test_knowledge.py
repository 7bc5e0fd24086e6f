"""The bundled weights keep the promises of docs/atlas.md; whoever retrains them finds out here."""

from __future__ import annotations

from dataclasses import asdict

import pytest

import errata
from errata.bench.knowledge import measure

LEAST = {
    "seen": 0.98,
    "unseen": 0.90,
    "alias": 0.80,
    "two_hop": 0.60,
    "locatable": 0.90,
    "locatable_transfer": 0.70,
    "written": 0.85,
    "written_rephrased": 0.40,
    "neighbours": 0.95,
}


@pytest.mark.slow
def test_the_bundled_model_knows_its_world_and_can_be_edited() -> None:
    """Five hundred questions of each kind; a sixth of the edits that `errata eval` tries."""
    known = asdict(measure(errata.load("atlas"), edits=32, facts=500))
    short = {name: (known[name], least) for name, least in LEAST.items() if known[name] < least}
    assert not short
    assert known["facts"] >= 3000 and known["edits"] == 32
