"""Runs that look at every step, and the recipes of OVERTONE's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errata.bench import run as module
from errata.bench.plan import Plan, PlanError
from errata.bench.run import parts
from errata.cli import call
from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from tests.families import language_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [ROOT / "recipes" / "overtone" / f"figure{number}.yaml" for number in (1, 2, 3)]
QUICK = {"ft-m": {"steps": 3, "stop": 0.0}}
CASES = [
    EditCase(f"{i}", (Fact("The capital of {} is", name, "Warsaw"),), (Probe(f"{name} has", ("Warsaw",)),))
    for i, name in enumerate(("France", "Japan"))
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


def go(plan: Plan, out: Path, lm: LanguageModel, **options: Any) -> dict[str, Any]:
    return module.run(plan, out, load=lambda: lm, cases=CASES, **options)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Path:
    out = tmp_path_factory.mktemp("curves") / "run"
    go(Plan("tiny", "few", ("ft-m",), ("ce", "overtone"), curves=True, settings=QUICK), out, lm)
    return out


def test_each_record_holds_its_curves_and_the_results_their_average(ran: Path) -> None:
    records = [json.loads(line) for line in (ran / "records.jsonl").open()]
    rows = json.loads((ran / "results.json").read_text())["rows"]
    for i, row in enumerate(rows):
        mine = [record["curves"]["loss"]["generality"] for record in records[2 * i : 2 * i + 2]]
        assert row["curves"]["edits"] == 2 and row["curves"]["steps"] == max(map(len, mine)) - 1
        assert row["curves"]["loss"]["generality"][0] == pytest.approx(sum(values[0] for values in mine) / 2, rel=1e-3)
    assert len(records[0]["curves"]["strips"][0]["loss"]) == 4 and records[0]["diagnostics"]["steps"] == 3


def test_curves_do_not_change_what_is_measured(ran: Path, tmp_path: Path, lm: LanguageModel) -> None:
    plain = go(Plan("tiny", "few", ("ft-m",), settings=QUICK), tmp_path / "plain", lm)["rows"][0]
    seen = json.loads((ran / "results.json").read_text())["rows"][0]
    assert "curves" not in plain and seen["metrics"] == plain["metrics"]


def test_editors_without_steps_have_no_curves(tmp_path: Path, lm: LanguageModel) -> None:
    settings = {"rome": {"steps": 1, "prefixes": 0, "whiten": False, "layers": [1]}}
    row = go(Plan("tiny", "few", ("rome",), curves=True, settings=settings), tmp_path / "run", lm)["rows"][0]
    assert row["curves"] is None and row["n"] == 2
    assert call(["draw", str(tmp_path / "run"), "--what", "figure1"]) == 2


def test_draw_all_and_one(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["draw", str(ran), "--to", str(tmp_path / "all"), "--json"]) == 0
    names = [Path(path).name for path in json.loads(capsys.readouterr().out)["files"]]
    assert names == ["figure1.png", "figure2.png", "figure3.png", "overtone-table.md"]
    assert call(["draw", str(ran), "--to", str(tmp_path / "one"), "--case", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["figure1.png", "figure2.png"]
    assert (tmp_path / "one" / "figure1.png").read_bytes() != (tmp_path / "all" / "figure1.png").read_bytes()
    assert call(["draw", str(ran), "--case", "7"]) == 2 and "has no case '7'" in capsys.readouterr().err
    assert call(["draw", str(ran), str(ran), "--to", str(tmp_path / "both"), "--what", "figure3"]) == 0
    assert call(["draw", str(ran), str(ran)]) == 2 and "figure3 and overtone-table alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"curves": True, "protocol": "sequential:4"}, "curves are of single edits"),
        ({"drawings": ("figure1",)}, "drawn from curves; add curves: true"),
        ({"drawings": ("figure3",), "protocol": "sequential:4"}, "none of the protocol 'sequential:4'"),
    ],
)
def test_plans_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan("m", "d", ("ft-m",), **fields)
    with pytest.raises(PlanError, match="curves must be true or false"):
        Plan.from_dict({"model": "m", "data": "d", "methods": ["ft-m"], "curves": 1})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_plans_whose_parts_fit(path: Path) -> None:
    plan = Plan.read(path)
    assert plan.drawings == (path.stem,) and path.read_text().startswith(f"# OVERTONE, Figure {path.stem[-1]}:")
    for row in plan.rows:
        parts(row.method, row.objective, plan.settings)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_here(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "atlas", "--data", "atlas", "--limit", "1", "--set", "lora.steps=2"]
    assert call(["bench", str(path), *small, "--out", str(tmp_path / "r")]) == 0, capsys.readouterr().err
    assert (tmp_path / "r" / f"{path.stem}.png").stat().st_size > 1000
