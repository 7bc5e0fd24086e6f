"""Retrieval as an editor: it touches no weight, remembers its session, optimises nothing and stands in a table once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import errata
from errata import methods
from errata.bench.plan import Plan
from errata.bench.run import parts, run
from errata.edits.notes import Notes
from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel, ModelError, encode
from tests.families import language_model

FACT = Fact("The capital of {} is", "France", "Lyon")
OTHER = Fact("{} was born in", "Marie Curie", "Tokyo")
BY = [{"by": "bm25"}, {"by": "embedding", "threshold": 0.5}]


def logits(lm: LanguageModel, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return lm.target_logits(lm.batch([encode(lm.tokenizer, prompt, "Paris")]))


@pytest.mark.parametrize("settings", BY, ids=lambda s: s["by"])
def test_the_question_is_read_behind_its_fact(settings: dict[str, Any]) -> None:
    lm = language_model("llama")
    expected = logits(lm, "The capital of France is Lyon.\nThe capital of France is")
    plain = logits(lm, FACT.text)
    made = errata.edit(lm, FACT, methods.get("retrieval", **settings))
    assert torch.equal(plain, logits(lm, FACT.text)) and not made.deltas and made.objective is None
    with made.applied_():
        assert torch.equal(expected, logits(lm, FACT.text))
    assert torch.equal(plain, logits(lm, FACT.text))


@pytest.mark.parametrize("settings", BY, ids=lambda s: s["by"])
def test_a_session_holds_all_its_facts_and_the_last_answer_to_each_prompt(settings: dict[str, Any]) -> None:
    lm = language_model("llama")
    session = methods.get("retrieval", **settings).start(lm)
    again = Fact(FACT.prompt, FACT.subject, "Nice")
    held = []
    for facts in ([FACT], [OTHER], [again]):
        edit = session.edit(facts)
        edit.apply()
        assert isinstance(edit.memory, Notes)
        held.append(edit.memory.facts)
        if edit.memory.vectors is not None:
            assert len(edit.memory.vectors) == len(edit.memory.facts)
    assert held == [(FACT,), (FACT, OTHER), (OTHER, again)]


def test_a_session_goes_on_from_its_state() -> None:
    lm = language_model("llama")
    session = methods.get("retrieval", by="embedding").start(lm, seed=3)
    with session.edit([FACT]).applied_():
        fresh = methods.get("retrieval", by="embedding").start(lm, seed=3)
        fresh.load_state_dict(session.state_dict())
        straight, resumed = session.edit([OTHER]).memory, fresh.edit([OTHER]).memory
    assert straight is not None and resumed is not None and (straight.id, straight.parent) == (resumed.id, resumed.parent)
    assert straight.settings() == resumed.settings() and torch.equal(straight.tensors()["vectors"], resumed.tensors()["vectors"])


def test_an_objective_is_refused_and_stands_in_no_plan() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="'overtone' would change nothing"):
        errata.edit(lm, FACT, "retrieval", "overtone")
    assert {name for name in methods.NAMES if not methods.get(name).optimises} == methods.WITHOUT_OBJECTIVE
    plan = Plan("atlas", "atlas", ("ft-m", "retrieval", "retrieval@k=2"), ("ce", "overtone"))
    assert [row.name for row in plan.rows] == ["ft-m+ce", "ft-m+overtone", "retrieval+none", "retrieval@k=2+none"]
    editor, _ = parts("retrieval@k=2", "none", {"retrieval@k=2": {"k": 2}})
    assert editor == errata.Retrieval(k=2)
    with pytest.raises(ValueError, match="no objective is called 'none'"):
        parts("ft-m", "none", {})


@pytest.mark.parametrize("protocol", ["single", "sequential:2"])
def test_it_is_measured_like_any_other(protocol: str, tmp_path: Any) -> None:
    cases = [EditCase(f.subject, (f,), locality={"far": (Probe("Lyon lies in", ("France",)),)}) for f in (FACT, OTHER)]
    plan = Plan("tiny", "cases", ("retrieval",), ("ce", "overtone"), protocol=protocol, threads=1)
    results = run(plan, tmp_path / "run", load=lambda: language_model("llama"), cases=cases)
    (row,) = results["rows"]
    assert (row["method"], row["objective"], row["n"], row["failed"]) == ("retrieval", "none", 2, 0)
    assert row["settings"]["objective"] is None
    if protocol == "single":
        assert row["metrics"]["locality"] == 100


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, message in (
        ({"by": "smell"}, "by must be 'bm25' or 'embedding'"),
        ({"form": "no slot"}, "form must have {} where the fact stands"),
        ({"k": 0}, "k must be at least 1"),
        ({"threshold": 2.0}, "threshold must be at least -1 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.get("retrieval", **settings)
    with pytest.raises(ModelError, match="layers 0 to 3, not 7"):
        methods.get("retrieval", by="embedding", layer=7).start(language_model("llama"))
