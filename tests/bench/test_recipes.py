"""The recipes: plans that are whole, that say how they are run, and that run in small on the bundled model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from errata.bench import run as module
from errata.bench.plan import Plan
from errata.bench.run import parts
from errata.cli import call
from errata.data import atlas
from errata.facts import EditCase, Fact
from errata.objectives import Overtone
from errata.report import DRAWINGS, OF_CASES, PICTURES
from errata.report.tables import edited

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
DELTAEDIT, OVERTONE, REPORT = ([path for path in RECIPES if path.parent.name == name] for name in ("deltaedit", "overtone", "report"))
CHECKPOINTS = (200, 500, 1000, 1500, 2000, 2500, 3000)

of_deltaedit = pytest.mark.parametrize("path", DELTAEDIT, ids=lambda path: path.stem)
of_overtone = pytest.mark.parametrize("path", OVERTONE, ids=lambda path: path.stem)
Planned = Callable[..., Plan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    """What `errata bench …` would run."""
    seen: list[Plan] = []

    def run(plan: Plan, out: Path, **options: Any) -> dict[str, Any]:
        seen.append(plan)
        return {"rows": []}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr("errata.cli.draw.after_bench", lambda *_, **__: None)

    def plan(*arguments: str) -> Plan:
        code = call(["bench", *arguments, "--out", str(tmp_path / str(len(seen))), "--json"])
        assert code == 0, capsys.readouterr().err
        return seen[-1]

    return plan


def commands(path: Path) -> dict[str, list[str]]:
    """ "Run" and "Here" -> the arguments behind `errata bench` in the recipe's comment, without --out."""
    lines = path.read_text().splitlines()
    said = {what: next(line for line in lines if line.startswith(f"# {what}:")) for what in ("Run", "Here")}
    return {what: shlex.split(line.partition("errata bench ")[2].removesuffix(" --out RUN")) for what, line in said.items()}


def first_lines(paths: list[Path]) -> str:
    return " ".join(path.read_text().splitlines()[0] for path in paths)


def test_there_is_no_other_paper() -> None:
    assert sorted([*DELTAEDIT, *OVERTONE, *REPORT]) == RECIPES


def test_there_is_one_for_each_item_of_deltaedit() -> None:
    first = first_lines(DELTAEDIT)
    for item in (
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4",
        "Table 5",
        "Figure 1",
        "Figure 2",
        "Figure 4a",
        "Figure 5",
        "Figure 6",
        "Figure 9",
    ):
        assert f"{item}:" in first or f"{item}," in first or f"{item}a:" in first, item


def test_there_is_one_for_each_item_of_overtone() -> None:
    first = first_lines(OVERTONE)
    for item in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Figure 1", "Figure 2", "Figure 3"):
        assert f"{item}:" in first or f"{item}," in first, item


@of_overtone
@pytest.mark.parametrize("model", [None, "atlas"])
def test_a_recipe_of_overtone_is_a_plan_whose_parts_fit(path: Path, model: str | None) -> None:
    """For the recipe's own model and, with what it says of that, for the bundled one."""
    plan = Plan.read(path).resolved(model)
    assert plan.drawings and set(plan.drawings) <= OF_CASES and plan.sequence is None
    assert set(plan.to_dict()) >= set(yaml.safe_load(path.read_text()))
    for row in plan.rows:
        parts(row.method, row.objective, plan.settings)
    assert all((row.method, row.objective) not in {("rome", "overtone"), ("memit", "overtone")} for row in plan.rows), "the paper's are not"
    assert plan.curves == bool(set(plan.drawings) & {"figure1", "figure2"})


@of_overtone
def test_the_comment_of_a_recipe_of_overtone_says_how_it_is_run(path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = commands(path)
    assert all(arguments[0] == str(path.relative_to(ROOT)) for arguments in said.values())
    own, whole = Plan.read(path).resolved(), planned(*said["Run"])
    beside = {"wise": {"irrelevant": "DATA/zsre_mend_train_10000.json"}} if "wise" in own.methods else {}
    assert whole == replace(own, settings={**own.settings, **beside})
    small = planned(*said["Here"])
    assert (small.model, small.data, small.protocol, small.rows) == ("atlas", "atlas", own.protocol, own.rows)
    assert small.settings == Plan.read(path).resolved("atlas").settings and small.limit is not None


def test_the_ablation_is_one_switch_a_row() -> None:
    plan = Plan.read(ROOT / "recipes" / "overtone" / "table3.yaml")
    losses = {row.name: parts(row.method, row.objective, plan.settings)[1] for row in plan.rows if row.seed == 0}
    whole = losses["lora+overtone"]
    assert isinstance(whole, Overtone) and len(losses) == 6
    switched = {"no-clip": "clip", "no-dyn": "dynamic", "no-check": "check", "no-filter": "filter"}
    for label, switch in switched.items():
        assert losses[f"lora@{label}+overtone"] == replace(whole, **{switch: False})


@of_deltaedit
def test_a_recipe_is_a_plan_whose_parts_fit(path: Path) -> None:
    plan = Plan.read(path)
    assert plan.drawings and plan.marks == CHECKPOINTS and plan.sequence == 3000 and plan.batch == 1
    assert set(plan.to_dict()) >= set(yaml.safe_load(path.read_text()))
    for row in plan.rows:
        parts(row.method, row.objective, plan.settings)
    assert ("case-study" in plan.drawings) == bool(plan.transcripts)
    if "eta" in plan.drawings:
        etas = [parts(method, "ce", plan.settings)[0].eta for method in plan.methods]  # type: ignore[attr-defined]  # DeltaEdit's
        assert [f"deltaedit@eta={value:g}" for value in etas] == list(plan.methods)


@of_deltaedit
def test_its_comment_says_how_it_is_run(path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = commands(path)
    assert all(arguments[0] == str(path.relative_to(ROOT)) for arguments in said.values())
    own = Plan.read(path)
    whole = planned(*said["Run"])
    assert whole == own
    small = planned(*said["Here"])
    assert (small.model, small.data, small.protocol, small.marks) == ("atlas", "atlas", "sequential:20", (4, 8, 12, 16, 20))
    assert small.methods == own.methods and small.drawings == own.drawings
    facts = [fact for case in small.draw(atlas.cases("test"), small.seeds[0]) for fact in case.facts]
    assert set(edited(small.transcripts, facts)) == set(small.transcripts), "the case study is about someone who is edited"


@pytest.mark.parametrize("path", REPORT, ids=lambda path: path.stem)
def test_the_recipes_of_the_report_edit_the_same_cases_and_say_how_they_are_run(
    path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said, own = commands(path), Plan.read(path)
    assert planned(*said["Run"]) == own and planned(*said["Here"]) == replace(own, protocol="sequential:20")
    for row in own.rows:
        parts(row.method, row.objective, own.settings)
    others = [Plan.read(other) for other in REPORT]
    assert all((plan.sequence, plan.seeds, plan.also, plan.transcripts) == (300, (0,), own.also, own.transcripts) for plan in others)
    facts = [fact for case in own.draw(atlas.cases("test"), 0) for fact in case.facts]
    assert set(edited(own.transcripts, facts)) == set(own.transcripts), "the case study is about what is edited"
    assert f"{path.relative_to(ROOT)}`" in (ROOT / "recipes" / "README.md").read_text()


def test_make_report_runs_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "recipes/report/$$recipe.yaml" in makefile
    assert f"for recipe in {' '.join(path.stem for path in REPORT)}" in makefile


@of_deltaedit
def test_the_readme_lists_it_with_what_it_draws(path: Path) -> None:
    (line,) = [line for line in (ROOT / "recipes" / "README.md").read_text().splitlines() if f"{path.relative_to(ROOT)}`" in line]
    named = [name for name in DRAWINGS if f"`{name}`" in line]
    assert named and set(named) <= set(Plan.read(path).drawings)


@pytest.mark.parametrize("records", [10_000, 20_877, 21_919])
def test_danielle_darrieux_is_among_the_edits(records: int) -> None:
    """She is case 0 of CounterFact, whichever of the usual files it is; the case study asks about her."""
    cases = [EditCase(str(i), (Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),)) for i in range(records)]
    for path in RECIPES:
        plan = Plan.read(path)
        if plan.data == "counterfact":
            assert all("0" in {case.id for case in plan.draw(cases, seed)} for seed in (*plan.seeds, 16, 18)), path


@pytest.fixture
def llama() -> Iterator[str]:
    yield str(ROOT / "recipes/deltaedit/table1-llama-3-8b.yaml")


def test_options_leave_no_checkpoints_that_do_not_fit(llama: str, planned: Planned) -> None:
    assert planned(llama, "--protocol", "sequential:1000").checkpoints == (200, 500, 1000)
    assert planned(llama, "--protocol", "sequential:20").marks == (4, 8, 12, 16, 20)
    assert planned(llama, "--protocol", "sequential:20", "--checkpoints", "5,10").marks == (5, 10, 20)
    assert planned(llama).checkpoints == CHECKPOINTS


def test_options_leave_no_settings_of_methods_that_are_not_run(llama: str, planned: Planned) -> None:
    both = planned(llama, "--methods", "rome,deltaedit", "--set", "deltaedit.eta=2").settings
    assert both == {"rome": {"whiten": False}, "deltaedit": {"eta": 2}}
    assert planned(llama, "--methods", "rome@a,rome@b").settings == {"rome": {"whiten": False}}
    assert planned(llama, "--methods", "alphaedit").settings == {}


def test_a_method_with_a_plus_in_its_name_is_not_taken_for_a_pair(tmp_path: Path, planned: Planned) -> None:
    settings = {"memit": {"lr": 0.1}, "memit+ce": {"reduction": "sum"}, "memit+history": {"lr": 0.2}}
    plan = Plan("m", "d", ("memit", "memit+history"), settings=settings)
    (tmp_path / "plan.yaml").write_text(plan.dump())
    assert planned(str(tmp_path / "plan.yaml"), "--methods", "memit+history").settings == {"memit+history": {"lr": 0.2}}
    assert planned(str(tmp_path / "plan.yaml"), "--methods", "memit").settings == {"memit": {"lr": 0.1}, "memit+ce": {"reduction": "sum"}}


def test_settings_from_the_command_line_are_checked_as_ever(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", llama, "--methods", "alphaedit", "--set", "memit.lr=1", "--out", str(tmp_path / "run")]) == 2
    assert "settings for 'memit', which is not used here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["figure9", "table4"])
def test_a_recipe_runs_here_from_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "recipes" / "deltaedit" / f"{name}.yaml"
    plan = Plan.read(path)
    quick = [f"--set={method}.steps=2" for method in dict.fromkeys(method.partition("@")[0] for method in plan.methods)]
    more = ["--transcript", "Jolis Sorgow lives in"] if plan.transcripts else []  # the first whom the plan's seed draws
    run = tmp_path / "run"
    code = call(["bench", str(path), "--model", "atlas", "--data", "atlas", "--protocol", "sequential:7", *quick, *more, "--out", str(run)])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert Plan.read(run / "plan.yaml").drawings == plan.drawings
    for drawing in plan.drawings:
        assert (run / f"{drawing}.{'png' if drawing in PICTURES else 'md'}").stat().st_size > 100
    if plan.transcripts:
        assert "edited knowledge: Jolis Sorgow is employed by Zanxox Industries" in (run / "case-study.md").read_text()
    again = tmp_path / "again"
    assert call(["draw", str(run), "--to", str(again)]) == 0
    assert sorted(file.stem for file in again.iterdir()) == sorted(plan.drawings)
