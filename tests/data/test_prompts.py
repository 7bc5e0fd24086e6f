from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data import DataError, load
from errata.data.prompts import factual
from errata.facts import EditCase, Fact, Probe

CASES = [
    EditCase(
        "a",
        (Fact("The capital of {} is", "France", "Rome"),),
        locality={"g": (Probe("The currency of France is", ("euro",)), Probe("The capital of France is", ("Paris",)))},
        neighbourhood=(Probe("The capital of Gaul is", ("Paris",)), Probe("The currency of France is", ("euro",))),
    )
]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_DATA", raising=False)


def test_atlas_gives_statements_that_are_not_edited() -> None:
    cases = load("atlas", limit=100)
    found = factual("atlas", cases)
    assert len(found.texts) == len(set(found.texts)) == 1000 and found.source == "atlas"
    assert found == factual("atlas", cases) != factual("atlas", cases, seed=1)
    assert factual("atlas", cases, limit=10).texts == found.texts[:10]
    everything = set(factual("atlas", [], limit=10**6).texts)
    without = set(factual("atlas", cases, limit=10**6).texts)
    assert len(everything) - len(without) == 100


def test_known_facts_are_taken_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert factual("counterfact", CASES, data_dir=tmp_path).source.startswith("locality")
    (tmp_path / "x").mkdir()
    records = [{"prompt": f"{name} is in", "subject": name} for name in ("FRANCE", "Beats Music", "Lyon")]
    (tmp_path / "x" / "known_1000.json").write_text(json.dumps(records))
    found = factual("counterfact", CASES, data_dir=tmp_path)
    assert sorted(found.texts) == ["Beats Music is in", "Lyon is in"] and found.source == "known_1000.json"
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path))
    assert factual(tmp_path / "mine.json", CASES) == found
    (tmp_path / "x" / "known_1000.json").write_text('[{"subject": "Lyon"}]')
    with pytest.raises(DataError, match=r"record 0, field 'prompt': is missing"):
        factual("counterfact", CASES)


def test_else_what_the_cases_ask_elsewhere() -> None:
    found = factual("counterfact", CASES)
    assert sorted(found.texts) == ["The capital of Gaul is", "The currency of France is"]
    with pytest.raises(ValueError, match=r"known_1000.json \(--data-dir\)"):
        factual("mine.jsonl", [EditCase("b", (Fact("X is", "", "Y"),))])
    with pytest.raises(ValueError, match="at least one prompt"):
        factual("atlas", [], limit=0)
