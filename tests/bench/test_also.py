"""What a sequence measures beside its cases: the same lines however often it is stopped, and the same edits as without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata import methods
from errata.bench import also
from errata.bench.folder import STATE
from errata.bench.plan import ALSO, Plan, PlanError
from errata.cli import call
from errata.data.atlas import corpus as atlas
from errata.edits import Edit
from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from errata.metrics import drift, fluency, generation
from errata.metrics.ability import AbilityError
from tests.bench.test_sequence import QUICK, SUBJECTS, Stop, cases, go, lines, stop_after, untimed
from tests.families import language_model

FEW = cases(*SUBJECTS[:6])
PLAN = Plan(
    model="tiny", data="few", methods=("ft-m", "lora"), protocol="sequential:4", checkpoints=(2,), also=ALSO,
    settings={
        **QUICK, "perplexity": {"tokens": 40}, "ability": {"tasks": ["cola", "sst2"], "limit": 3}, "fluency": {"prompts": 3, "tokens": 6},
        "extended": {"tokens": 4},
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def tests_of_ability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "ability"
    folder.mkdir()
    for name in ("cola", "sst2"):
        (folder / f"{name}.json").write_text(json.dumps([{"sentence": f"Lyon lies in {i}", "label": i % 2} for i in range(4)]))
    return folder.parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, tests_of_ability: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    go(out, lm, PLAN, FEW, data_dir=tests_of_ability)
    return out


def marks(out: Path) -> list[dict[str, Any]]:
    return [line["also"] for line in lines(out) if "also" in line]


def test_it_is_what_the_measurements_say_of_the_model_at_each_checkpoint(lm: LanguageModel, undisturbed: Path) -> None:
    half, end, *_ = marks(undisturbed)
    chosen = PLAN.draw(FEW, 0)
    prompts = also.elsewhere(FEW, chosen, 0)
    before = drift.states(lm, prompts)
    said = fluency.score_all(lm, [case.facts[0].text for case in chosen[:3]], 6)
    session = methods.get("ft-m", **QUICK["ft-m"]).start(lm, seed=0)
    made: list[Edit] = []
    assert half["fluency"]["before"] == [round(value, 4) for value in said.values[:2]], "of those that are edited by then"
    assert end["fluency"]["before"] == [round(value, 4) for value in said.values] and "texts" not in half["fluency"]
    assert [text["before"] for text in end["fluency"]["texts"]] == list(said.texts)
    try:
        for case in chosen:
            made.append(session.edit(case.facts))
            made[-1].apply()
        assert end["drift"] == drift.measure(before, drift.states(lm, prompts))
        assert end["perplexity"]["after"] == round(also.of_held_out(lm, tokens=40), 6)
        (score,) = generation.extended(lm, chosen[:1], max_new_tokens=4)
        assert end["extended"][score.id]["after"] == {k: v for k, v in score.to_dict().items() if k != "id"}
    finally:
        for edit in reversed(made):
            edit.revert()
    assert end["perplexity"]["before"] == round(also.of_held_out(lm, tokens=40), 6) == half["perplexity"]["before"]
    assert half["perplexity"]["after"] != end["perplexity"]["after"] and "points" not in half["drift"]
    assert len(end["drift"]["points"]["after"]) == len(prompts)
    assert "extended" not in half and list(end["extended"]) == [case.id for case in chosen]
    assert {name: scores["n"] for name, scores in end["ability"]["after"].items()} == {"cola": 3, "sst2": 3}


def test_what_the_results_say_of_it(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    for row, (half, end) in zip(results["rows"], zip(*[iter(marks(undisturbed))] * 2, strict=True), strict=True):
        for mark, line in zip(row["metrics"]["checkpoints"], (half, end), strict=True):
            assert mark["also"]["perplexity"] == line["perplexity"]
            assert mark["also"]["drift"]["cka"] == line["drift"]["cka"] and "points" not in mark["also"]["drift"]
            cola = mark["also"]["ability"]["cola"]
            after, before = (line["ability"][when]["cola"]["f1"] for when in ("after", "before"))
            assert cola["n"] == 3 and cola["f1"] == {"before": before, "after": after, "difference": after - before}
        assert set(row["metrics"]["checkpoints"][-1]["also"]["extended"]) == {"before", "after"}
    assert set(results["environment"]["ability_sha256"]) == {"cola", "sst2"}
    assert not (undisturbed / STATE).exists()


@pytest.mark.parametrize("stops", [[1], [2, 3], [4, 6]])
def test_stopped_and_resumed_gives_the_same_lines(
    tmp_path: Path, lm: LanguageModel, undisturbed: Path, tests_of_ability: Path, stops: list[int]
) -> None:
    for number in stops:
        with pytest.raises(Stop):
            go(tmp_path, lm, PLAN, FEW, resume=True, data_dir=tests_of_ability, progress=stop_after(number))
    result = go(tmp_path, lm, PLAN, FEW, resume=True, data_dir=tests_of_ability)
    assert untimed(result) == untimed(json.loads((undisturbed / "results.json").read_text()))
    assert marks(tmp_path) == marks(undisturbed)


def test_stopped_while_measuring(
    tmp_path: Path, lm: LanguageModel, undisturbed: Path, tests_of_ability: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unedited model is asked once; the checkpoint is measured again as a whole."""
    real, asked = also.Fluency.take, []

    def take(self: also.Fluency, lm: LanguageModel, about: also.About) -> dict[str, Any]:
        asked.append(len(about.cases))
        if asked == [4, 2]:
            raise Stop
        return real(self, lm, about)

    monkeypatch.setattr(also.Fluency, "take", take)
    with pytest.raises(Stop):
        go(tmp_path, lm, PLAN, FEW, data_dir=tests_of_ability)
    go(tmp_path, lm, PLAN, FEW, resume=True, data_dir=tests_of_ability)
    assert asked == [4, 2, 2, 4, 2, 4] and marks(tmp_path) == marks(undisturbed)


def test_the_edits_are_those_of_a_run_that_measures_nothing_beside(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    plain = go(tmp_path, lm, replace(PLAN, also=(), settings=QUICK), FEW)
    whole = json.loads((undisturbed / "results.json").read_text())
    for one, other in zip(plain["rows"], whole["rows"], strict=True):
        assert one["weights_sha256"] == other["weights_sha256"]
        for mark in other["metrics"]["checkpoints"]:
            del mark["also"]
    for result in (plain, whole):
        result["environment"].pop("ability_sha256", None)
    assert untimed(plain) == untimed(whole)
    assert all("also" not in line for line in lines(tmp_path))


def test_prompts_elsewhere_are_about_other_subjects() -> None:
    def about(number: int, subject: str) -> EditCase:
        return EditCase(f"{number}", (Fact("{} lies in", subject, "Lyon"),), (Probe(f"{subject} is in", ("Lyon",)),), neighbourhood=NEAR)

    NEAR = (Probe("Oslo lies in", ("Norway",)),)
    everything = [about(0, "Rome"), about(1, "Rome"), about(2, "Nice"), about(3, "Bern")]
    assert set(also.elsewhere(everything, everything[:1], 0)) == {"Nice lies in", "Nice is in", "Bern lies in", "Bern is in"}
    assert also.elsewhere(everything, everything, 0) == ["Oslo lies in"], "nothing else is left"
    with pytest.raises(PlanError, match="drift needs prompts"):
        also.elsewhere([], [EditCase("a", (Fact("{} lies in", "Rome", "Lyon"),))], 0)


@pytest.mark.parametrize(
    ("change", "wrong", "message"),
    [
        ({"also": ["perplexty"]}, PlanError, "also: unknown measurement 'perplexty'; did you mean 'perplexity'"),
        ({"also": ["drift", "drift"]}, PlanError, "drift stands there twice"),
        ({"protocol": "single", "checkpoints": []}, PlanError, "also belongs to a sequence"),
        ({"also": ["drift"], "settings": {"ability": {}}}, PlanError, "settings for 'ability', which is not used here"),
        ({"settings": {"ability": {"limt": 3}}}, PlanError, "ability has no setting 'limt'; did you mean 'limit'"),
        ({"settings": {"ability": {"by": "guess"}}}, PlanError, "it is 'probability' or 'generate'"),
        ({"settings": {"drift": {"prompts": "many"}}}, PlanError, r"drift\.prompts cannot be 'many'"),
        ({"settings": {"extended": {"chat": "an"}}}, PlanError, r"extended\.chat cannot be 'an'"),
        ({"settings": {"ability": {"tasks": ["mmlu"]}}}, AbilityError, r"no mmlu\.json"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tests_of_ability: Path, change: dict[str, Any], wrong: type[Exception], message: str
) -> None:
    with pytest.raises(wrong, match=message):
        also.measurements(Plan.from_dict({**PLAN.to_dict(), **change}), tests_of_ability)


def test_the_command_line_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_DATA", raising=False)
    command = ["bench", "--model", "atlas", "--data", "atlas", "--methods", "ft-m", "--protocol", "sequential:4"]
    asked: list[tuple[list[str], str]] = [
        (["--also", "ability"], "where are the tests of 'cola'? say the folder that holds cola.json"),
        (["--also", "fluensy"], "did you mean 'fluency'"),
        (["--also", "drift", "--set", "fluency.tokens=3"], "settings for 'fluency', which is not used here"),
    ]
    for more, message in asked:
        assert call([*command, *more, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_of_before_is_read(tmp_path: Path) -> None:
    record = {name: value for name, value in PLAN.to_dict().items() if name != "also"} | {"settings": QUICK}
    assert Plan.from_dict(record).also == ()


@pytest.mark.parametrize(
    "setting",
    ["ability.limit=0", "ability.limit=-3", "perplexity.texts=0", "perplexity.tokens=1", "drift.prompts=0", "drift.layer=-1",
     "fluency.prompts=0", "fluency.tokens=0", "extended.tokens=0"],
)  # fmt: skip
def test_settings_that_measure_nothing_are_refused(setting: str, tests_of_ability: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is loaded."""
    asked = ["bench", "--model", "none", "--data", "atlas", "--methods", "ft-m", "--protocol", "sequential:4", "--also", ",".join(ALSO)]
    assert call([*asked, "--data-dir", str(tests_of_ability), "--out", "never", "--set", setting, "--set", "ability.tasks=cola,sst2"]) == 2
    owner, name = setting.partition("=")[0].split(".")
    assert f"error: {owner}: {name} must be at least" in capsys.readouterr().err


def test_perplexity_of_the_bundled_model_is_of_text_that_no_statistics_saw() -> None:
    known = set(atlas.sample().split("\n\n"))
    fresh = also.fresh_documents()
    assert len(fresh) == 64 and sum(text in known for text in fresh) < 4, "but for a few that are a line long"
