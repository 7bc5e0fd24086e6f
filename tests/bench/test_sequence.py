"""Sequences on a tiny random model: the same bits however often they are stopped, and means that are those of the lines."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from errata import methods
from errata.bench import run as module
from errata.bench.folder import RECORDS, RESULTS, STATE
from errata.bench.plan import Plan, PlanError
from errata.bench.sequence import steps
from errata.edits import DenseDelta, Edit, LowRankDelta, Stack
from errata.edits.delta import Delta
from errata.facts import EditCase, Fact, FactError, Probe
from errata.lm import LanguageModel
from errata.methods.base import Method, Session
from errata.metrics import probability
from tests.families import language_model
from tests.methods.test_contract import QUICK as SMALL

ROOT = Path(__file__).parents[2]
SUBJECTS = ("France", "Japan", "Russia", "Marie Curie", "Lyon", "Warsaw", "Tokyo", "Zürich")
TARGETS = ("Warsaw", "Lyon, in France", "Paris")
QUICK = {"ft-m": {"steps": 3, "lr": 0.02, "layer": 2}, "lora": {"steps": 3, "lr": 0.02, "dropout": 0.2, "rank": 2}}
PLAN = Plan(
    model="tiny", data="few", methods=("ft-m", "lora"), objectives=("ce",), protocol="sequential:7", checkpoints=(2, 5), measure="both",
    transcripts=("The capital of Japan is",), settings=QUICK,
)  # fmt: skip
SIX = probability.COLUMNS


def cases(*subjects: str) -> list[EditCase]:
    return [
        EditCase(
            id=f"{number}-{subject}",
            facts=(Fact("The capital of {} is", subject, TARGETS[number % 3], "Tokyo"),),
            rephrases=(Probe(f"{subject} has the capital", (TARGETS[number % 3],)),) if number % 2 else (),
            neighbourhood=(Probe("The capital of Poland is", ("Tokyo",)), Probe("Lyon lies in", ("France",))),
        )
        for number, subject in enumerate(subjects or SUBJECTS)
    ]


@dataclass(frozen=True)
class Odd(Method):
    """Seeded noise that carries on from edit to edit; about Narnia there is nothing to edit, and Lyon breaks the weights.

    finish takes half of everything away again.
    """

    name = "odd"
    paper = ""

    def start(self, lm: LanguageModel, objective: Any = None, seed: int = 0) -> Session:
        return OddSession(lm, self, objective, seed)


class OddSession(Session):
    sizes: torch.Tensor | None = None

    def _edit(self, facts: list[Fact]) -> Edit:
        if any(fact.subject == "Narnia" for fact in facts):
            raise FactError("there is no Narnia")
        path, size = self.lm.anatomy.mlp_down[2], torch.rand(1)  # torch's own generator
        self.sizes = size if self.sizes is None else torch.cat([self.sizes, size])
        left, right = torch.randn(self.lm.anatomy.hidden_size, len(facts)), torch.randn(len(facts), self.lm.anatomy.key_size)
        left *= 0.1 * self.sizes.mean() * (torch.inf if any(fact.subject == "Lyon" for fact in facts) else 1)
        return Edit(self.lm, [LowRankDelta(path, left, right)], facts, {"name": "odd"}, None, {"seconds_value": 0.5, "losses": [1.0]})

    def finish(self) -> list[Delta]:
        path = self.lm.anatomy.mlp_down[2]
        return [DenseDelta(path, -0.5 * Stack.of(self.lm).change(path)[1])]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sizes": self.sizes}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.sizes = state["sizes"]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    get = methods.get
    monkeypatch.setattr(methods, "get", lambda name, **own: Odd() if name == "odd" else get(name, **own))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


def go(out: Path, lm: LanguageModel, plan: Plan = PLAN, data: Sequence[EditCase] | None = None, **options: Any) -> dict[str, Any]:
    return module.run(plan, out, load=lambda: lm, cases=data or cases(), **options)


TIMED = ("seconds_per_edit", "peak_memory_mb", "seconds_by_stage")


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock or the operating system measured."""
    rows = [{name: value for name, value in row.items() if name not in TIMED} for row in results["rows"]]
    over = [{name: value for name, value in row.items() if name not in TIMED} for row in results.get("over_seeds", [])]
    return {**results, "rows": rows, "over_seeds": over}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).open()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    go(out, lm)
    return out


def results_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / RESULTS).read_text())
    return found


class Stop(Exception):
    pass


def stop_after(number: int) -> Callable[[int, int, str], None]:
    def progress(done: int, of: int, what: str) -> None:
        if done == number:
            raise Stop

    return progress


def test_a_sequence_against_a_plain_loop(lm: LanguageModel, undisturbed: Path) -> None:
    """One after the other with the public parts: the same outcomes at each checkpoint, the same weights at the end."""
    row = results_in(undisturbed)["rows"][0]
    chosen = PLAN.draw(cases(), 0)
    assert [case.id for case in chosen] != sorted(case.id for case in chosen), "the order is drawn too"
    stack = Stack.of(lm)
    before = probability.unedited(lm, chosen)
    session = methods.get("ft-m", **QUICK["ft-m"]).start(lm, seed=0)
    right_after = []
    try:
        for done, case in enumerate(chosen, 1):
            session.edit(case.facts).apply()
            right_after.append(probability.score(lm, case, before).to_dict())
            if done in (2, 5, 7):
                records = [score.to_dict() for score in probability.score_all(lm, chosen[:done], before)]
                (mark,) = [mark for mark in row["metrics"]["checkpoints"] if mark["edits"] == done]
                for name, value in probability.summarise(records).items():
                    assert mark[name] == (None if value is None else pytest.approx(value, abs=1e-5)), name
                for name in SIX:
                    there = [record[name] for record in right_after if record[name] is not None]
                    assert mark["after_each"][name] == (pytest.approx(100 * fmean(there), abs=1e-5) if there else None)
                starts = [start for start in (0, 2, 5) if start < done]
                for block, start, end in zip(mark["by_age"], starts, [*starts[1:], done], strict=True):
                    assert block["edits"] == [start + 1, end]
                    assert block["score"] == pytest.approx(probability.summarise(records[start:end])["score"], abs=1e-5)
        (path,) = stack.touched
        weight = lm.model.get_submodule(path).weight.detach()
        digest = hashlib.sha256(f"{path} torch.float32\n".encode() + weight.numpy().tobytes()).hexdigest()
    finally:
        stack.clear()
    assert row["weights_sha256"] == digest
    assert {name: row["metrics"][name] for name in SIX} == {name: row["metrics"]["checkpoints"][-1][name] for name in SIX}
    assert row["metrics"]["noise"] > 0 and row["metrics"]["k_beta"] is None, "fine-tuning writes no one rank a fact"
    assert list(row["metrics"]["checkpoints"][-1]["noise_by_layer"]) == [path]


def test_what_a_row_says(lm: LanguageModel, undisturbed: Path) -> None:
    results = results_in(undisturbed)
    for row in results["rows"]:
        assert (row["protocol"], row["measure"], row["batch"]) == ("sequential:7", "both", 1)
        assert (row["n"], row["failed"], row["not_finite"]) == (7, 0, 0)
        assert set(row["intervals"]) == set(SIX)
        low, high = row["intervals"]["efficacy_top"]
        assert low <= row["metrics"]["efficacy_top"] <= high
        assert row["seconds_per_edit"] > 0 and row["peak_memory_mb"] > 1 and row["seconds_by_stage"]["apply"] >= 0
        assert row["settings"]["method"]["steps"] == 3 and row["settings"]["objective"]["name"] == "ce"
        assert row["transcripts"][0]["prompt"] == PLAN.transcripts[0]
        assert row["transcripts"][0]["before"] == lm.generate(PLAN.transcripts, 40, stop_at_newline=False)[0]
        assert "generation" in row["metrics"] and "generation" not in row["metrics"]["checkpoints"][0]
    assert not (undisturbed / STATE).exists(), "nothing but the plan, the lines and the results stays"
    assert len({row["weights_sha256"] for row in results["rows"]}) == 2


def test_the_model_is_left_as_it_was(tmp_path: Path, lm: LanguageModel) -> None:
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    calls: list[tuple[int, int]] = []
    go(tmp_path / "whole", lm, progress=lambda done, of, what: calls.append((done, of)))
    assert calls == [(done, 14) for done in range(1, 15)]
    with pytest.raises(Stop):
        go(tmp_path / "stopped", lm, progress=stop_after(4))
    assert all(torch.equal(parameter, before[name]) for name, parameter in lm.model.named_parameters())
    assert not Stack.of(lm).active
    edit = Edit(lm, [DenseDelta(lm.anatomy.mlp_down[0], torch.zeros_like(lm.model.get_submodule(lm.anatomy.mlp_down[0]).weight))], [], {})
    with edit.applied_(), pytest.raises(PlanError, match="edits applied"):
        go(tmp_path / "edited", lm)


@pytest.mark.parametrize(("stops", "every"), [([1], 50), ([2, 3], 50), ([6], 2), ([4, 9, 13], 3), ([14], 1)])
def test_stopped_and_resumed_gives_the_same_bits(
    tmp_path: Path, lm: LanguageModel, undisturbed: Path, stops: list[int], every: int
) -> None:
    for number in stops:
        with pytest.raises(Stop):
            go(tmp_path, lm, resume=True, progress=stop_after(number), snapshot_every=every)
        with open(tmp_path / RECORDS, "ab") as file:
            file.write(b'{"method": "ft-m", "objec')  # what a kill while writing leaves
        torch.rand(7)  # the world has moved on meanwhile
    assert untimed(go(tmp_path, lm, resume=True, snapshot_every=every)) == untimed(results_in(undisturbed))
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(undisturbed)]


def test_stopped_while_measuring(tmp_path: Path, lm: LanguageModel, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edits before a checkpoint are on the disk when its measuring begins: none is made again."""
    real, seen = module.sequence.probability.score_all, []

    def score_all(lm: LanguageModel, chosen: Sequence[EditCase], before: Any) -> Any:
        seen.append(len(chosen))
        if len(chosen) == 5 and seen.count(5) == 1:
            raise Stop
        return real(lm, chosen, before)

    monkeypatch.setattr(module.sequence.probability, "score_all", score_all)
    with pytest.raises(Stop):
        go(tmp_path, lm)
    made = []
    edit = Session.edit
    monkeypatch.setattr(Session, "edit", lambda self, facts: made.append(self.method.name) or edit(self, facts))
    assert untimed(go(tmp_path, lm, resume=True)) == untimed(results_in(undisturbed))
    assert made.count("ft-m") == 2 and made.count("lora") == 7


def test_a_line_that_was_lost_is_made_again(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    """Whoever removes a damaged line of a sequence gets that line back, from the beginning of the sequence if need be."""
    with pytest.raises(Stop):
        go(tmp_path, lm, progress=stop_after(6), snapshot_every=2)
    kept = (tmp_path / RECORDS).read_text().splitlines(keepends=True)
    lost = [i for i, line in enumerate(kept) if '"checkpoint 2"' in line or '"edit 3"' in line]
    (tmp_path / RECORDS).write_text("".join(line for i, line in enumerate(kept) if i not in lost))
    assert untimed(go(tmp_path, lm, resume=True)) == untimed(results_in(undisturbed))
    assert len(lines(tmp_path)) == len(lines(undisturbed))


def test_a_damaged_snapshot_says_so(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    with pytest.raises(Stop):
        go(tmp_path, lm, progress=stop_after(4))
    (snapshot,) = (tmp_path / STATE).glob("*.pt")
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    with pytest.raises(PlanError, match=r"ft-m\+ce\.0\.pt is damaged.*remove it"):
        go(tmp_path, lm, resume=True)
    snapshot.unlink()
    assert untimed(go(tmp_path, lm, resume=True)) == untimed(results_in(undisturbed))


def test_resuming_a_finished_run_changes_nothing(lm: LanguageModel, undisturbed: Path) -> None:
    content = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    go(undisturbed, lm, resume=True)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == content


@pytest.mark.parametrize("measure", ["after-each", "after-sequence"])
def test_one_timing_alone_is_that_of_both(tmp_path: Path, lm: LanguageModel, undisturbed: Path, measure: str) -> None:
    plan = replace(PLAN, measure=measure, methods=("ft-m",), settings={"ft-m": QUICK["ft-m"]})
    (row,), both = go(tmp_path, lm, plan)["rows"], results_in(undisturbed)["rows"][0]
    assert row["measure"] == measure and row["weights_sha256"] == both["weights_sha256"]
    for mark, whole in zip(row["metrics"]["checkpoints"], both["metrics"]["checkpoints"], strict=True):
        assert "after_each" not in mark
        expected = whole["after_each"] if measure == "after-each" else whole
        assert {name: mark[name] for name in SIX} == {name: expected[name] for name in SIX}
        assert mark["noise"] == whole["noise"]
    assert any("outcomes" in line for line in lines(tmp_path) if line["step"].startswith("edit")) == (measure == "after-each")


def test_batches_of_cases(tmp_path: Path, lm: LanguageModel) -> None:
    plan = replace(PLAN, batch=3, checkpoints=(), methods=("ft-m",), settings={"ft-m": QUICK["ft-m"]}, transcripts=())
    whole = go(tmp_path / "whole", lm, plan)
    edits = [line for line in lines(tmp_path / "whole") if line["step"].startswith("edit")]
    assert [(line["step"], len(line["cases"])) for line in edits] == [("edit 3", 3), ("edit 6", 3), ("edit 7", 1)]
    assert [mark["edits"] for mark in whole["rows"][0]["metrics"]["checkpoints"]] == [3, 6, 7]
    assert whole["rows"][0]["n"] == 7 and whole["rows"][0]["batch"] == 3
    with pytest.raises(Stop):
        go(tmp_path / "stopped", lm, plan, progress=stop_after(3))
    assert untimed(go(tmp_path / "stopped", lm, plan, resume=True)) == untimed(whole)
    assert [step.edits for step in steps(cases(), 4)] == [4, 8]


def test_labels_carry_settings_of_their_own(tmp_path: Path, lm: LanguageModel) -> None:
    settings = {"ft-m": QUICK["ft-m"], "ft-m@lr=0.2": {"lr": 0.2}, "ft-m@same": {}}
    plan = replace(PLAN, methods=("ft-m", "ft-m@lr=0.2", "ft-m@same"), settings=settings)
    plain, fast, same = go(tmp_path, lm, plan)["rows"]
    assert [row["settings"]["method"]["lr"] for row in (plain, fast, same)] == [0.02, 0.2, 0.02]
    assert fast["settings"]["method"]["steps"] == 3, "what is not in the label's settings is the method's"
    assert plain["weights_sha256"] == same["weights_sha256"] != fast["weights_sha256"]


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("stop", [None, 1, 2, 3, 4, 5, 6])
def test_edits_that_fail(tmp_path: Path, lm: LanguageModel, stop: int | None) -> None:
    """A fact that cannot be edited is in no mean; one whose edit would break the weights is, as the model without it answers."""
    data = cases("France", "Narnia", "Japan", "Lyon", "Russia", "Tokyo")
    plan = Plan("tiny", "few", ("odd",), protocol="sequential:6", checkpoints=(1, 2, 3), measure="both")
    if stop:
        with pytest.raises(Stop):
            go(tmp_path, lm, plan, data, progress=stop_after(stop), snapshot_every=2)
    results = go(tmp_path, lm, plan, data, resume=True, snapshot_every=2)
    (row,) = results["rows"]
    assert (row["n"], row["failed"], row["not_finite"]) == (5, 2, 1)
    errors = {line["cases"][0]: (line["failure"], line["error"]) for line in lines(tmp_path) if "error" in line}
    assert errors["1-Narnia"] == ("fact", "there is no Narnia")
    assert errors["3-Lyon"][0] == "not finite" and "mlp.down_proj" in errors["3-Lyon"][1]
    assert row["seconds_by_stage"]["value"] == 0.5 and row["metrics"]["noise"] is not None
    assert all(parameter.isfinite().all() for parameter in lm.model.parameters())
    go(tmp_path.with_name(tmp_path.name + "-plain"), lm, plan, data)
    assert untimed(results) == untimed(results_in(tmp_path.with_name(tmp_path.name + "-plain")))


@pytest.mark.usefixtures("odd")
def test_what_a_method_does_at_the_end_is_there_while_it_is_measured(tmp_path: Path, lm: LanguageModel) -> None:
    """Half of everything is taken away at each checkpoint, and is back for the next edit."""
    seen: list[torch.Tensor] = []
    path = lm.anatomy.mlp_down[2]
    weight = lm.model.get_submodule(path).weight.detach()
    base = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        real = module.sequence.probability.score_all
        patch.setattr(module.sequence.probability, "score_all", lambda *args: seen.append(weight - base) or real(*args))
        plan = Plan("tiny", "few", ("odd",), protocol="sequential:3", checkpoints=(1, 2), measure="both")
        go(tmp_path, lm, plan, cases("France", "Japan", "Russia"))
    after_one, at_one, after_two, at_two, after_three, at_three = seen
    for whole, half in ((after_one, at_one), (after_two, at_two), (after_three, at_three)):
        torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after_two, after_one)
    facts = cases()[0].facts
    edit = Odd().start(lm, seed=4).complete(facts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Odd().start(lm).edit(facts)
        torch.manual_seed(0)
        complete = Odd().start(lm).complete(facts)
    assert [delta.kind for delta in edit.deltas] == ["low_rank", "dense"] and not edit.applied
    with plain.applied_():
        whole = weight - base
    with complete.applied_():
        torch.testing.assert_close(weight - base, whole / 2, rtol=1e-4, atol=1e-5)


def test_seeds_are_other_orders(tmp_path: Path, lm: LanguageModel) -> None:
    plan = replace(PLAN, seeds=(0, 1), methods=("ft-m",), settings={"ft-m": QUICK["ft-m"]}, protocol="sequential:8", transcripts=())
    results = go(tmp_path, lm, plan)
    orders = [[line["cases"][0] for line in lines(tmp_path) if line["seed"] == seed and "cases" in line] for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    (over,) = results["over_seeds"]
    for name in ("efficacy_top", "noise"):
        assert over["mean"][name] == pytest.approx(fmean(row["metrics"][name] for row in results["rows"]), rel=1e-4)
    assert [mark["edits"] for mark in over["checkpoints"]] == [2, 5, 8]
    assert over["checkpoints"][-1]["mean"] == over["mean"] and "edits" not in over["mean"]


def test_half_precision_too(tmp_path: Path) -> None:
    lm = language_model("gpt2", dtype=torch.bfloat16)
    plan = replace(PLAN, methods=("ft-m",), settings={"ft-m": QUICK["ft-m"]})
    whole = go(tmp_path / "whole", lm, plan)
    for number in (3, 6):
        with pytest.raises(Stop):
            go(tmp_path / "stopped", lm, plan, resume=True, progress=stop_after(number))
    assert untimed(go(tmp_path / "stopped", lm, plan, resume=True)) == untimed(whole)


def test_a_sequence_longer_than_the_data_is_refused_before_anything_is_written(tmp_path: Path, lm: LanguageModel) -> None:
    with pytest.raises(PlanError, match=r"a sequence of 9 needs as many cases; few has 8"):
        go(tmp_path / "run", lm, replace(PLAN, protocol="sequential:9"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_every_method_goes_on_to_the_same_bits(tmp_path: Path, batch: int) -> None:
    """Whatever a method carries from edit to edit: stopped again and again, after every fourth edit.

    DeltaEdit's threshold is low, so that edits are held off the history before a stop and after it.
    """
    lm, names = language_model("llama"), tuple(methods.NAMES)
    settings = {name: SMALL[name] | {"epochs" if name == "locft" else "steps": 3} for name in names if name != "retrieval"}
    # of three edits of two facts only the last would come after a first noise and be held
    settings["deltaedit"] |= {"warm_up": 1, "eta": 0.1, "start_at": "first" if batch == 1 else "zero"}
    plan = Plan("tiny", "few", names, protocol="sequential:5", checkpoints=(4,), batch=batch, settings=settings)
    data = cases()
    whole = go(tmp_path / "whole", lm, plan, data)
    seen = 0

    def stop(done: int, of: int, what: str) -> None:
        nonlocal seen
        seen += 1
        if seen % (4 if batch == 1 else 2) == 0:
            raise Stop

    def held() -> list[int]:
        edits = [line for line in lines(tmp_path / "stopped") if line["method"] == "deltaedit" and line["step"].startswith("edit")]
        return [line["diagnostics"]["constrained"] for line in edits]

    stops, so_far = 0, []
    while True:
        try:
            results = go(tmp_path / "stopped", lm, plan, data, resume=True, progress=stop, snapshot_every=2)
            break
        except Stop:
            stops += 1
            so_far.append(held())
    assert stops >= len(names)
    for row, other in zip(untimed(whole)["rows"], untimed(results)["rows"], strict=True):
        assert row == other, row["method"]
    assert any(0 < sum(before) < sum(held()) for before in so_far), (so_far, held())
    different = {row["weights_sha256"] for row in whole["rows"]}
    assert len(different) >= len(names) - 1, "after so few edits PRUNE is MEMIT"


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, lm: LanguageModel, undisturbed: Path) -> None:
    """SIGKILL: no handler, no flush, no clean-up of any kind."""
    killed = 6
    script = f"""
import os, signal
from pathlib import Path
from tests.bench import test_sequence as here
def progress(done, of, what):
    if done == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
here.go(Path({str(tmp_path)!r}), here.language_model("llama"), progress=progress, snapshot_every=4)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert sum("cases" in line for line in lines(tmp_path)) == killed and not (tmp_path / RESULTS).exists()
    assert untimed(go(tmp_path, lm, resume=True, snapshot_every=4)) == untimed(results_in(undisturbed))
