"""Continual editing: blocks of T edits from the unedited model, whose T = 1 is single editing to the last bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import methods
from errata.bench import run as module
from errata.bench.folder import RECORDS
from errata.bench.outcomes import outcomes
from errata.bench.plan import NO_OBJECTIVE, Plan, PlanError
from errata.bench.run import parts
from errata.cli import call
from errata.edits import Edit, LowRankDelta, Stack
from errata.facts import EditCase, Fact, FactError, Probe, Question
from errata.lm import LanguageModel
from errata.methods.base import Method, Session
from errata.metrics import teacher_forced
from tests.families import language_model

SUBJECTS = ("France", "Japan", "Russia", "Warsaw", "Lyon")
TARGETS = ("Warsaw", "Lyon, in France", "Paris")
LOCATE = {"steps": 2, "lr": 0.5, "prefixes": 0, "corpus": "bundled", "tokens": 200}
QUICK: dict[str, dict[str, Any]] = {
    "ft-l": {"steps": 2, "lr": 0.05, "layer": 2},
    "ft-m": {"steps": 2, "lr": 0.05, "layer": 2},
    "lora": {"steps": 2, "lr": 0.05, "dropout": 0.2, "rank": 2},
    "locft": {"epochs": 2, "lr": 0.05, "layer": 2},
    "melo": {"steps": 2, "lr": 0.1, "scale": 1.0, "radius": 1.0},
    "wise": {"steps": 2, "lr": 3.0, "margins": [0.01, 0.02, 0.01], "irrelevant": ["Where is Lyon?", "Pierre worked in"]},
    "retrieval": {},
    **{name: LOCATE for name in ("rome", "memit", "memit+history", "prune", "rect")},
    **{name: {**LOCATE, "share": 1.0, "l2": 1e-4} for name in ("alphaedit", "deltaedit")},
}
PLAN = Plan("tiny", "few", ("ft-m",), protocol="continual:2", settings={"ft-m": QUICK["ft-m"]})


def cases(*subjects: str) -> list[EditCase]:
    return [
        EditCase(
            id=f"{number}-{subject}",
            facts=(Fact("The capital of {} is", subject, TARGETS[number % 3]),),
            rephrases=(Probe(f"{subject} has the capital", (TARGETS[number % 3],)),),
            locality={"other": (Probe(f"{subject} lies in", ("Question",)),)},
        )
        for number, subject in enumerate(subjects or SUBJECTS)
    ]


def go(out: Path, lm: LanguageModel, plan: Plan = PLAN, data: Sequence[EditCase] | None = None, **options: Any) -> dict[str, Any]:
    return module.run(plan, out, load=lambda: lm, cases=data or cases(), **options)


def lines(out: Path) -> dict[str, dict[str, Any]]:
    """Case -> its last line, without what a clock or the operating system measured, and without its place."""
    found = [json.loads(line) for line in (out / RECORDS).open()]
    for one in found:
        one["diagnostics"] = {k: v for k, v in one.get("diagnostics", {}).items() if not k.startswith("seconds")}
    return {one["case"]: {k: v for k, v in one.items() if k not in ("seconds", "peak_memory_mb", "block", "place")} for one in found}


def measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds_per_edit", "peak_memory_mb")} for row in results["rows"]]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


class Odd(Method):
    """Noise from torch's own generator. About Narnia there is nothing to edit, and Lyon breaks the weights."""

    name = "odd"
    paper = ""

    def start(self, lm: LanguageModel, objective: Any = None, seed: int = 0) -> Session:
        return OddSession(lm, self, objective, seed)


class OddSession(Session):
    def _edit(self, facts: list[Fact]) -> Edit:
        if facts[0].subject == "Narnia":
            raise FactError("there is no Narnia")
        left, right = torch.randn(self.lm.anatomy.hidden_size, 1), torch.randn(1, self.lm.anatomy.key_size)
        left *= torch.inf if facts[0].subject == "Lyon" else 0.3
        return Edit(self.lm, [LowRankDelta(self.lm.anatomy.mlp_down[2], left, right)], facts, {"name": "odd"}, None)


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    get = methods.get
    monkeypatch.setattr(methods, "get", lambda name, **own: Odd() if name == "odd" else get(name, **own))


@pytest.mark.parametrize("name", methods.NAMES)
def test_one_edit_in_a_row_is_single_editing(name: str, tmp_path: Path, lm: LanguageModel) -> None:
    single = Plan("tiny", "few", (name,), settings={name: QUICK[name]}, limit=2, seeds=(3,))
    first = go(tmp_path / "single", lm, single)
    second = go(tmp_path / "one", lm, replace(single, protocol="continual:1"))
    assert lines(tmp_path / "single") == lines(tmp_path / "one")
    (one,), (other,) = measured(first), measured(second)
    assert one["metrics"] == other["metrics"] and one["intervals"] == other["intervals"] and one["n"] == other["n"] == 2
    assert (other["blocks"], other["last_block"]) == (2, 1)


@pytest.mark.parametrize("name", ["ft-m", "melo", "prune"])
def test_a_block_is_a_session_and_begins_at_the_unedited_model(name: str, tmp_path: Path, lm: LanguageModel) -> None:
    plan = replace(PLAN, methods=(name,), settings={name: QUICK[name]})
    go(tmp_path / "run", lm, plan)
    found, (row,) = lines(tmp_path / "run"), plan.rows
    drawn = plan.draw(cases(), row.seed)
    for block in (drawn[:2], drawn[2:4], drawn[4:]):
        before = teacher_forced.unedited(lm, block)
        method, objective = parts(name, "ce", plan.settings)
        session = method.start(lm, objective, row.case_seed("\n".join(case.id for case in block)))
        for case in block:
            torch.manual_seed(row.case_seed(case.id))
            session.edit(case.facts).apply()
        last = Edit(lm, extra, [], {"name": "last"}) if (extra := session.finish()) else None
        if last:
            last.apply()
        for case, outcome in zip(block, json.loads(json.dumps(outcomes(lm, block, before))), strict=True):
            assert {key: found[case.id][key] for key in outcome} == outcome
        Stack.of(lm).clear()


def test_the_lines_say_where_a_case_stood(tmp_path: Path, lm: LanguageModel) -> None:
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    (row,) = go(tmp_path / "run", lm)["rows"]
    found = [json.loads(line) for line in (tmp_path / "run" / RECORDS).open()]
    assert [(line["block"], line["place"]) for line in found] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    assert [line["case"] for line in found] == [case.id for case in PLAN.draw(cases(), 0)]
    assert (row["blocks"], row["last_block"], row["n"], row["failed"]) == (3, 1, 5, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())


def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path, lm: LanguageModel) -> None:
    plan = replace(PLAN, methods=("lora", "melo"), settings={name: QUICK[name] for name in ("lora", "melo")})
    whole = measured(go(tmp_path / "run", lm, plan, cases("France", "Japan", "Russia")))
    undisturbed = (tmp_path / "run" / RECORDS).read_text().splitlines(keepends=True)
    kept = lines(tmp_path / "run")
    for number in (1, 2, 4):  # within a block, between two, and in the next row; killed while it wrote
        (tmp_path / "run" / RECORDS).write_text("".join(undisturbed[:number]) + undisturbed[number][:20])
        assert measured(go(tmp_path / "run", lm, plan, cases("France", "Japan", "Russia"), resume=True)) == whole
        assert lines(tmp_path / "run") == kept and len((tmp_path / "run" / RECORDS).read_text().splitlines()) == len(undisturbed)


def test_what_cannot_be_edited_is_a_line_and_the_others_go_on(tmp_path: Path, lm: LanguageModel, odd: None) -> None:
    plan = Plan("tiny", "few", ("odd",), protocol="continual:9")
    long = EditCase("far", (Fact("The capital of {} is", "Zürich", "Paris"),), locality={"other": (Probe("Lyon lies in. " * 60, ("e",)),)})
    (row,) = go(tmp_path / "run", lm, plan, [*cases("France", "Narnia", "Lyon", "Japan"), long])["rows"]
    found = lines(tmp_path / "run")
    assert {case: line.get("failure") for case, line in found.items()} == {
        "0-France": None, "1-Narnia": "fact", "2-Lyon": "not finite", "3-Japan": None, "far": "text",
    }  # fmt: skip
    assert (row["n"], row["failed"]) == (3, 3), "Lyon is asked about too: so the model answers whose edit came to nothing"
    assert "reliability" in found["2-Lyon"] and "reliability" not in found["1-Narnia"] and "reliability" not in found["far"]
    order = [case for case in plan.draw([*cases("France", "Narnia", "Lyon", "Japan"), long], 0) if case.id in ("0-France", "3-Japan")]
    go(tmp_path / "two", lm, plan, order)
    assert {case: found[case]["probes"] for case in ("0-France", "3-Japan")} == {
        case: line["probes"] for case, line in lines(tmp_path / "two").items()
    }


def test_measured_after_each_edit_or_both(tmp_path: Path, lm: LanguageModel) -> None:
    plan = replace(PLAN, settings={"ft-m": {"steps": 5, "lr": 0.5, "layer": 2}})  # so that edits disturb one another
    both = go(tmp_path / "both", lm, replace(plan, measure="both"))["rows"][0]
    each = go(tmp_path / "each", lm, replace(plan, measure="after-each"))["rows"][0]
    end = go(tmp_path / "end", lm, plan)["rows"][0]
    assert {k: v for k, v in both["metrics"].items() if k != "after_each"} == end["metrics"]
    assert both["metrics"]["after_each"] == each["metrics"] and "after_each" not in end["metrics"]
    (first, *_), found = plan.draw(cases(), 0), lines(tmp_path / "both")
    assert found[first.id]["after_each"]["generation"] != found[first.id]["generation"], "a later edit moves what is said of an earlier one"


def test_questions_are_asked_of_the_model_after_all_edits(tmp_path: Path) -> None:
    lm = language_model("llama", max_position_embeddings=1024)  # the prompts of MQuAKE are long
    asked = (Question(("Which is the capital of France?",), ("Warsaw",)), Question(("Who lives there?",), ("e",), 2))
    data = [replace(case, questions=asked) if case.id.startswith("0") else case for case in cases("France", "Japan")]
    single = go(tmp_path / "single", lm, replace(PLAN, protocol="single", seeds=(5,)), data)["rows"][0]
    one = go(tmp_path / "one", lm, replace(PLAN, protocol="continual:1", seeds=(5,)), data)["rows"][0]
    assert single["metrics"] == one["metrics"] and "multi_hop" in one["metrics"]
    assert [("questions" in line) for line in lines(tmp_path / "one").values()].count(True) == 1


def test_a_model_with_edits_is_refused(tmp_path: Path, lm: LanguageModel) -> None:
    with methods.get("ft-m", **QUICK["ft-m"]).start(lm).edit(cases()[0].facts).applied_(), pytest.raises(PlanError, match="unedited model"):
        go(tmp_path / "run", lm)


def test_single_and_continual_draw_the_same_cases_in_their_own_order() -> None:
    many = cases(*(f"place {number}" for number in range(40)))
    single, row = (replace(PLAN, protocol=protocol, limit=12).draw(many, 1) for protocol in ("single", "continual:5"))
    assert {case.id for case in single} == {case.id for case in row} and single != row
    assert single == sorted(single, key=many.index)


def test_some_methods_are_run_with_some_objectives() -> None:
    plan = Plan("m", "d", ("rome", "ft-m", "retrieval"), ("ce", "overtone"), only={"rome": ("ce",)}, protocol="continual:3")
    there = [(row.method, row.objective) for row in plan.rows]
    assert there == [("rome", "ce"), ("ft-m", "ce"), ("ft-m", "overtone"), ("retrieval", NO_OBJECTIVE)]
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "continual"}, "needs a number of edits"),
        ({"protocol": "continual:0"}, "needs a number of edits"),
        ({"curves": True}, "curves are of single edits"),
        ({"checkpoints": (1,)}, "belongs to a sequence"),
        ({"drawings": ("table1",)}, "single or continual|sequential"),
        ({"only": {"rome": ("ce",)}}, "'rome' is not used here"),
        ({"only": {"ft-m": ("overtone",)}}, "'overtone' is not used here"),
        ({"only": {"ft-m": ()}}, "left without an objective"),
        ({"overrides": {"atlas": {"rome": {"lr": 1}}}}, "settings for 'rome'"),
    ],
)
def test_plans_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(PLAN, **fields)


def test_a_model_has_settings_of_its_own() -> None:
    plan = replace(PLAN, overrides={"atlas": {"ft-m": {"lr": 0.2}}})
    assert plan.resolved().settings == PLAN.settings and plan.resolved("other").settings == PLAN.settings
    own = plan.resolved("atlas")
    assert own.settings == {"ft-m": {**QUICK["ft-m"], "lr": 0.2}} and own.model == "atlas" and own.overrides == {}


def test_from_the_command_line_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        *("bench", "--model", "atlas", "--data", "atlas", "--methods", "ft-m", "--objectives", "ce,overtone", "--limit", "3"),
        *("--protocol", "continual:2", "--set", "ft-m.steps=1", "--out", str(tmp_path / "run")),
    ]
    assert call(run) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "continual:2: 2 times 2 edits in a row (the last one 1), measured: after-sequence" in said
    assert call([*run, "--resume"]) == 0 and call(["draw", str(tmp_path / "run"), "--what", "overtone-table"]) == 0
    table = (tmp_path / "run" / "overtone-table.md").read_text()
    assert "T = 2 (the last row 1), 3 edits" in table and "\n| + overtone |" in table and "\n| difference |" in table
