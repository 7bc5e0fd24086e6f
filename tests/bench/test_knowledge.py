"""The bundled weights keep the promises of docs/atlas.md; whoever retrains them finds out here."""

from __future__ import annotations

import json

import pytest

from errata.cli import call

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
def test_the_bundled_model_knows_its_world_and_can_be_edited(capsys: pytest.CaptureFixture[str]) -> None:
    """Sixty questions of each kind, and a third of the edits that `errata eval` tries."""
    assert call(["eval", "--model", "atlas", "--data", "atlas", "--limit", "60", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    short = {name: (known[name], least) for name, least in LEAST.items() if known[name] < least}
    assert not short
    assert known["facts"] >= 3000 and known["edits"] == 60
