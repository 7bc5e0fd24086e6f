"""Single edits in batches: the lines are those of one by one, whatever stands in a batch together and however often a run is stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata import methods
from errata.bench import batches
from errata.bench import run as module
from errata.bench.folder import PLAN as PLAN_FILE
from errata.bench.folder import RECORDS
from errata.bench.plan import Plan
from errata.facts import EditCase, Fact, Probe, Question
from errata.lm import LanguageModel
from tests.bench.test_run import cases
from tests.families import language_model
from tests.methods.test_contract import QUICK

NAMES = ("ft-m", "lora")
SETTINGS = {name: {**QUICK[name], "steps": 4} for name in NAMES}
PLAN = Plan("tiny", "few", NAMES, batch=3, settings=SETTINGS)


def some() -> list[EditCase]:
    """Five, and one of them with a text that the model cannot take, another with questions."""
    found = cases("France", "Japan", "Russia", "Lyon", "Paris")
    long = Probe("word " * 1200, ("Paris",))
    found[1] = replace(found[1], locality={"other": (long,)})
    found[3] = replace(found[3], questions=(Question(("Where does Lyon lie?",), ("France",)),))
    return found


def lines(out: Path, lm: LanguageModel, plan: Plan, **options: Any) -> list[dict[str, Any]]:
    module.run(plan, out, load=lambda: lm, cases=some(), **options)
    return [json.loads(line) for line in (out / RECORDS).open()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dropped = ("seconds", "peak_memory_mb", "diagnostics")
    return [{name: value for name, value in record.items() if name not in dropped} for record in records]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama", dtype=torch.float64, max_position_embeddings=1024)  # the prompts of MQuAKE are long


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> list[dict[str, Any]]:
    return lines(tmp_path_factory.mktemp("batched") / "run", lm, PLAN)


def test_lines_are_those_of_one_by_one(tmp_path: Path, lm: LanguageModel, batched: list[dict[str, Any]]) -> None:
    alone = lines(tmp_path / "run", lm, replace(PLAN, batch=1))
    assert untimed(batched) == untimed(alone)
    assert [("error" in record) for record in batched] == [False, True, False, False, False] * 2
    assert all("questions" in record for record in batched if record["case"] == "3-Lyon")
    for ours, theirs in zip(batched, alone, strict=True):
        if "error" not in ours:
            assert ours["seconds"]["edit"] > 0 and ours["seconds"]["measure"] > 0
            assert ours["diagnostics"]["steps"] == theirs["diagnostics"]["steps"]


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_a_stopped_run_goes_on_to_the_same_lines(tmp_path: Path, lm: LanguageModel, batched: list[dict[str, Any]], kept: int) -> None:
    """Also from the middle of a batch."""
    lines(tmp_path / "run", lm, PLAN)
    path = tmp_path / "run" / RECORDS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    assert untimed(lines(tmp_path / "run", lm, PLAN, resume=True)) == untimed(batched)


def test_a_fact_that_cannot_be_edited(lm: LanguageModel) -> None:
    method, objective = module.parts("ft-m", "ce", SETTINGS)
    bad = replace(some()[0], id="bad", facts=(Fact("word " * 1200 + "{} is", "France", "Paris"),))
    found = batches.lines(PLAN.rows[0], method, objective, lm, [bad, *cases()], batches.Before())
    assert "too long" in found[0]["error"] and not any("error" in line for line in found[1:])


def test_what_rows_share_changes_nothing(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows after the first find what the layers below the edit make of the texts, as far as there is room for it."""
    row = PLAN.rows[0]
    ran: list[object] = []
    handle = lm.model.get_submodule(lm.anatomy.mlp_down[0]).register_forward_hook(lambda *_: ran.append(None))

    def made(before: batches.Before, cases: list[EditCase]) -> tuple[list[dict[str, Any]], int]:
        ran.clear()
        return untimed(batches.lines(row, *module.parts("ft-m", "ce", SETTINGS), lm, cases, before)), len(ran)

    one = cases("France", "Japan", "Russia")
    alone, calls = made(batches.Before(), one)
    shared = batches.Before()
    assert made(shared, one) == (alone, calls)
    again, fewer = made(shared, one)
    assert again == alone and fewer < calls
    known = batches.Before()
    known.said = shared.said
    assert made(known, one)[1] > fewer, "what it says is not all that is shared"
    assert made(shared, cases("Russia", "Lyon"))[0] == made(batches.Before(), cases("Russia", "Lyon"))[0], "some are known"
    monkeypatch.setattr(batches, "KEPT", 0)
    whole = batches.Before()
    assert made(whole, one)[0] == alone and made(whole, one)[1] > fewer, "there is no room"
    handle.remove()


@pytest.mark.parametrize("lr", [1e20, 1e37])
def test_an_edit_that_breaks_the_model_leaves_the_rows_after_it_alone(lm: LanguageModel, lr: float) -> None:
    row, wild = PLAN.rows[0], {"ft-m": {**SETTINGS["ft-m"], "lr": lr}}
    before = batches.Before()
    broken = batches.lines(row, *module.parts("ft-m", "ce", wild), lm, cases("France", "Japan", "Russia"), before)
    assert not any("error" in line for line in broken)
    method, objective = module.parts("ft-m", "ce", SETTINGS)
    after, fresh = (
        batches.lines(row, method, objective, lm, cases("France", "Japan", "Russia"), one) for one in (before, batches.Before())
    )
    assert untimed(after) == untimed(fresh)


def test_size_is_chosen_from_memory_and_kept(tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= batches.fitting(lm) <= batches.MOST
    monkeypatch.setattr(batches.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1})())
    assert batches.fitting(lm) == 1
    lines(tmp_path / "run", lm, replace(PLAN, batch=0, methods=("ft-m",), settings={"ft-m": SETTINGS["ft-m"]}))
    assert Plan.read(tmp_path / "run" / PLAN_FILE).batch == 1
    one = 6 * 8 * lm.anatomy.hidden_size * lm.anatomy.key_size  # in float64, without what tokens leave behind
    monkeypatch.setattr(batches, "TOKENS", 0)
    monkeypatch.setattr(batches.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 10 * one})())
    assert batches.fitting(lm) == 10 and batches.fitting(lm, workers=2) < 5, "half of the memory, less the other worker's model"


def test_who_edits_together() -> None:
    """DeltaEdit and PRUNE are made one by one, and measured side by side as the others."""
    located = {"rome", "memit", "memit+history", "prune", "rect", "alphaedit", "deltaedit"}
    assert {name for name in methods.NAMES if batches.edits_together(methods.get(name))} == {"ft-l", "ft-m", "lora", "melo", *located}


@given(edits=st.integers(1, 500), most=st.integers(1, 64))
def test_batches_are_of_about_one_size(edits: int, most: int) -> None:
    size = batches.even(edits, most)
    number = -(-edits // size)
    assert 1 <= size <= most and number == -(-edits // most), "in no more than the largest batches would take"
    assert edits - (number - 1) * size > size - number, "and the last is shorter by less than one for each of them"
