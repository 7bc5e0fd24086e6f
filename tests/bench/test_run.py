"""The run: with a tiny random model and a method that writes seeded noise, so that what is tested is the run and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.bench import run as module
from errata.bench.folder import RECORDS, RESULTS
from errata.bench.plan import Plan, PlanError
from errata.edits import Edit, LowRankDelta
from errata.facts import EditCase, Fact, FactError, Probe, Question
from errata.lm import LanguageModel
from tests.families import language_model

ROOT = Path(__file__).parents[2]
SUBJECTS = ("France", "Japan", "Russia")
PLAN = Plan(model="tiny", data="few", methods=("noise", "loud"), objectives=("ce", "overtone"))


@dataclass(frozen=True)
class Noise:
    """Adds seeded noise to one matrix; refuses a fact about Narnia."""

    size: float = 0.3

    def start(self, lm: LanguageModel, objective: Any = None, seed: int = 0) -> Session:
        return Session(self, lm, seed)


@dataclass
class Session:
    method: Noise
    lm: LanguageModel
    seed: int

    def edit(self, facts: Sequence[Fact]) -> Edit:
        if facts[0].subject == "Narnia":
            raise FactError("there is no Narnia")
        draw = torch.Generator().manual_seed(self.seed)
        path = self.lm.anatomy.mlp_down[2]
        out, width = self.lm.anatomy.hidden_size, self.lm.anatomy.key_size
        left, right = torch.randn(out, 1, generator=draw), torch.randn(1, width, generator=draw) * self.method.size
        diagnostics = {"steps": 3, "final_loss": float(torch.rand(())), "losses": [3.0, 2.0]}  # draws from torch's own generator too
        return Edit(self.lm, [LowRankDelta(path, left, right)], facts, {"name": "noise", "size": self.method.size}, None, diagnostics)

    complete = edit


def parts(method: str, objective: str, settings: Any) -> tuple[Noise, None]:
    return Noise({"noise": 0.3, "loud": 1.0}[method]), None


def cases(*subjects: str) -> list[EditCase]:
    return [
        EditCase(
            id=f"{number}-{subject}",
            facts=(Fact("The capital of {} is", subject, "Warsaw"),),
            rephrases=(Probe(f"{subject} has the capital", ("Warsaw",)),),
            portability={"reasoning": (Probe(f"Who is born in the capital of {subject}?", ("Marie Curie", "Marie")),)}
            if number % 2
            else {},
            locality={"other": (Probe(f"{subject} lies in", ("Question",)), Probe("The capital of Poland is", ("Tokyo",)))},
        )
        for number, subject in enumerate(subjects or SUBJECTS)
    ]


def go(out: Path, lm: LanguageModel, plan: Plan = PLAN, data: list[EditCase] | None = None, **options: Any) -> dict[str, Any]:
    return module.run(plan, out, load=lambda: lm, cases=data or cases(), **options)


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock or the operating system measured."""
    rows = [{name: value for name, value in row.items() if name not in ("seconds_per_edit", "peak_memory_mb")} for row in results["rows"]]
    return {**results, "rows": rows}


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).open()]


@pytest.fixture(scope="module", autouse=True)
def fake_method() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parts", parts)
        yield


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, fake_method: None) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    go(out, lm)
    return out


def results_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / RESULTS).read_text())
    return found


def test_a_run_measures_every_row_and_leaves_the_model_as_it_was(tmp_path: Path, lm: LanguageModel) -> None:
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    calls = []
    results = go(tmp_path, lm, progress=lambda done, of, what: calls.append((done, of)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in lm.model.named_parameters())
    assert calls == [(done, 12) for done in range(1, 13)]
    assert [(row["method"], row["n"], row["failed"]) for row in results["rows"]] == [("noise", 3, 0)] * 2 + [("loud", 3, 0)] * 2
    for row in results["rows"]:
        assert {"reliability", "generality", "portability", "locality", "average", "generation"} <= set(row["metrics"])
        assert row["seconds_per_edit"] > 0 and row["peak_memory_mb"] > 1
    quiet, loud = results["rows"][0]["metrics"], results["rows"][2]["metrics"]
    assert loud["locality"] < 100, "noise of that size moves what it should not"
    assert quiet["locality"] >= loud["locality"]
    assert results["rows"][0]["metrics"] == results["rows"][1]["metrics"], "the same seeds for both objectives"
    assert json.loads((tmp_path / RESULTS).read_text()) == results
    assert results["environment"]["model_fingerprint"] == lm.fingerprint and results["environment"]["torch"].startswith("2.")
    record = json.loads((tmp_path / RECORDS).read_text().splitlines()[0])
    assert record["diagnostics"].keys() == {"steps", "final_loss"}, "curves stay with the edit"
    assert Plan.read(tmp_path / "plan.yaml").threads == torch.get_num_threads()


class Stop(Exception):
    pass


def stop_after(number: int) -> Callable[[int, int, str], None]:
    def progress(done: int, of: int, what: str) -> None:
        if done == number:
            raise Stop

    return progress


@pytest.mark.parametrize("stops", [[1], [5, 8], [12]])
def test_stopped_and_resumed_gives_the_same_results(tmp_path: Path, lm: LanguageModel, undisturbed: Path, stops: list[int]) -> None:
    for number in stops:
        with pytest.raises(Stop):
            go(tmp_path, lm, resume=True, progress=stop_after(number))
        with open(tmp_path / RECORDS, "ab") as file:
            file.write(b'{"method": "noise", "objec')  # what a kill while writing leaves
    torch.rand(7)  # the world has moved on meanwhile
    assert untimed(go(tmp_path, lm, resume=True)) == untimed(results_in(undisturbed))
    clocks = {"seconds": 0, "peak_memory_mb": 0}
    assert [record | clocks for record in records(tmp_path)] == [record | clocks for record in records(undisturbed)]


def test_resuming_a_finished_run_changes_nothing(lm: LanguageModel, undisturbed: Path) -> None:
    content = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    go(undisturbed, lm, resume=True)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == content


def test_a_row_does_not_depend_on_its_company(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    plan = Plan(model="tiny", data="few", methods=("loud",), objectives=("overtone",))
    alone = go(tmp_path, lm, plan, list(reversed(cases())))
    assert alone["rows"][0]["metrics"] == results_in(undisturbed)["rows"][3]["metrics"]


def test_unedited_outputs_are_computed_once(tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = module.teacher_forced.unedited
    monkeypatch.setattr(module.teacher_forced, "unedited", lambda lm, cases: seen.extend(case.id for case in cases) or real(lm, cases))
    go(tmp_path, lm)
    assert seen == [case.id for case in cases()]


def test_a_fact_that_cannot_be_edited_is_written_down_and_counted(tmp_path: Path, lm: LanguageModel) -> None:
    data = cases("France", "Narnia", "Japan")
    results = go(tmp_path, lm, data=data)
    assert [(row["n"], row["failed"]) for row in results["rows"]] == [(2, 1)] * 4
    errors = [record for record in records(tmp_path) if "error" in record]
    assert {record["error"] for record in errors} == {"there is no Narnia"} and len(errors) == 4
    assert untimed(go(tmp_path, lm, data=data, resume=True)) == untimed(results)


def test_other_data_or_another_model_is_refused(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    with pytest.raises(PlanError, match="data_hash was"):
        go(undisturbed, lm, data=cases("France"), resume=True)
    with pytest.raises(PlanError, match="model_fingerprint was"):
        go(undisturbed, language_model("llama", seed=1), resume=True)
    with pytest.raises(PlanError, match="two cases with the id '0-France'"):
        go(tmp_path / "new", lm, data=cases("France") * 2)
    assert not (tmp_path / "new").exists()


def test_evaluate_without_editing(lm: LanguageModel) -> None:
    result = module.evaluate(lm, cases())
    assert result["n"] == 3 and result["metrics"]["locality"] is None and result["metrics"]["reliability"] is not None
    edit = Noise().start(lm, seed=1).edit(cases()[0].facts)
    edited = module.evaluate(lm, cases(), edit)
    assert not edit.applied and edited["metrics"]["locality"] is not None


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_results(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    """SIGKILL: no handler, no flush, no clean-up of any kind."""
    script = f"""
import os, signal
from pathlib import Path
from tests.bench import test_run as here
here.module.parts = here.parts
def progress(done, of, what):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
here.go(Path({str(tmp_path)!r}), here.language_model("llama"), progress=progress)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(records(tmp_path)) == 5 and not (tmp_path / RESULTS).exists()
    assert untimed(go(tmp_path, lm, resume=True)) == untimed(results_in(undisturbed))


def test_questions_are_asked_and_stand_in_the_record(tmp_path: Path, lm: LanguageModel) -> None:
    lm = language_model("llama", max_position_embeddings=1024)  # the prompts of MQuAKE are long
    asked = (Question(("Which is the capital of France?",), ("Warsaw",)), Question(("Who lives there?", "Whose city is it?"), ("e",), 2))
    data = [replace(case, questions=asked) if case.id.startswith("0") else case for case in cases()]
    results = go(tmp_path / "run", lm, data=data)
    lines = [json.loads(line) for line in (tmp_path / "run" / RECORDS).read_text("utf-8").splitlines()]
    assert [("questions" in line) for line in lines] == [line["case"].startswith("0") for line in lines]
    replies = next(line["questions"] for line in lines if "questions" in line)["asked"][1]["replies"]
    assert [reply["wording"] for reply in replies] == ["Who lives there?", "Whose city is it?"] and all("text" in one for one in replies)
    for row in results["rows"]:
        assert {"one_hop", "one_hop_all", "multi_hop", "hops_2"} <= set(row["metrics"]) and row["intervals"]["multi_hop"][0] is not None
        assert row["n"] == 3 and row["failed"] == 0


def test_a_text_too_long_for_the_model_fails_its_case_alone(tmp_path: Path, lm: LanguageModel) -> None:
    long = "Lyon lies in France. " * 60
    fact, probe = Fact("The capital of {} is", "France", "Warsaw"), Probe(long, ("Question",))
    data = [*cases("Japan"), EditCase("far", (fact,), locality={"other": (probe,)}), EditCase("ask", (fact,), portability={"r": (probe,)})]
    results = go(tmp_path / "run", lm, data=data)
    assert [(row["n"], row["failed"]) for row in results["rows"]] == [(1, 2)] * 4
    lines = [json.loads(line) for line in (tmp_path / "run" / RECORDS).read_text("utf-8").splitlines()]
    assert all(("too long" in line.get("error", "")) == (line["case"] in ("far", "ask")) for line in lines)
    assert not lm.model.training and results["rows"][0]["metrics"] == go(tmp_path / "one", lm, data=cases("Japan"))["rows"][0]["metrics"]
