"""A run's tasks in several processes: the lines of one process, whatever a worker, or the run itself, comes to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, current_process
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from errata.bench import run as module
from errata.bench.folder import RECORDS, RESULTS, STATE, Record
from errata.bench.plan import Plan, PlanError
from errata.bench.tasks import Task, Work
from errata.bench.workers import WorkerError, Workers, _Shared
from errata.facts import EditCase, Fact
from errata.lm import LanguageModel
from tests.bench.test_sequence import cases
from tests.families import language_model

ROOT = Path(__file__).parents[2]
LOAD = partial(language_model, "llama", dtype=torch.float64)
QUICK = {"ft-m": {"steps": 3, "lr": 0.02, "layer": 2}, "lora": {"steps": 3, "lr": 0.02, "rank": 2}}
SINGLE = Plan("tiny", "few", ("ft-m", "lora"), batch=3, settings=QUICK, threads=1)
PLANS = {
    "single": SINGLE,
    "one by one": replace(SINGLE, batch=1, curves=True, seeds=(0, 1)),
    "continual": replace(SINGLE, batch=0, protocol="continual:3"),
    "sequential": replace(SINGLE, batch=0, protocol="sequential:6", measure="both", seeds=(0, 1)),
}


def go(plan: Plan, out: Path, **options: Any) -> tuple[list[Record], dict[str, Any]]:
    """Lines in an order of their own, and the results, without what is measured with a clock."""
    module.run(plan, out, cases=cases(), **{"load": LOAD, **options})
    lines = [json.loads(line) for line in (out / RECORDS).open()]
    results = json.loads((out / RESULTS).read_text())
    timed = ("seconds", "seconds_per_edit", "seconds_by_stage", "peak_memory_mb")

    def untimed(value: Any) -> Any:
        if isinstance(value, list):
            return [untimed(item) for item in value]
        return {name: untimed(item) for name, item in value.items() if name not in timed} if isinstance(value, dict) else value

    return sorted(map(untimed, lines), key=lambda line: json.dumps(line, sort_keys=True)), untimed(results)


@pytest.mark.parametrize(("protocol", "then"), [("single", 3), ("one by one", 1), ("continual", 1), ("sequential", 1)])
def test_lines_and_results_are_those_of_one_process(tmp_path: Path, protocol: str, then: int) -> None:
    """Also of a run that is cut off and goes on with another number of workers."""
    plan = PLANS[protocol]
    alone = go(plan, tmp_path / "alone")
    both = go(plan, tmp_path / "both", workers=2)
    assert both == alone
    path = tmp_path / "both" / RECORDS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert go(plan, tmp_path / "both", workers=then, resume=True) == alone
    assert not (tmp_path / "both" / STATE).exists()


def test_each_has_its_share_of_the_threads(tmp_path: Path) -> None:
    """Where the plan says no number; and what a run began with stays, however many go on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan = replace(SINGLE, threads=None)
        go(plan, tmp_path, workers=2)
        assert Plan.read(tmp_path / "plan.yaml").threads == 1
        go(plan, tmp_path, resume=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def another() -> LanguageModel:
    """The model of `LOAD` in the process that asks, another one in the workers."""
    return LOAD(seed=int("worker" in current_process().name))


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    lm = LOAD()
    with pytest.raises(PlanError, match=r"each worker loads the model for itself.*give `load` as a function of a module"):
        go(SINGLE, tmp_path / "lambda", load=lambda: lm, workers=2)
    assert not (tmp_path / "lambda").exists()
    with pytest.raises(PlanError, match="workers must be at least 1"):
        go(SINGLE, tmp_path / "none", workers=0)
    with pytest.raises(PlanError, match="tiny is not the model that the run began with: its fingerprint is"):
        go(SINGLE, tmp_path / "other", load=another, workers=2)


class Odd(Exception):
    """Cannot be made again from its text alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def noting(folder: Path, deeds: dict[int, Callable[[], object]]) -> Work:
    """Notes which process begins what, and does what stands there for a task's number."""

    def work(task: Task) -> Generator[Record]:
        (folder / f"{task.number} {os.getpid()}").touch()
        time.sleep(0.05)
        yield {"case": task.cases[0].id, "number": task.number, "half": 1}
        deeds.get(task.number, int)()
        yield {"case": task.cases[0].id, "number": task.number, "half": 2}

    return work


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def odd() -> None:
    raise Odd(1, 2)


def plain() -> None:
    raise ValueError("not this fact")


def tasks(*subjects: str) -> list[Task]:
    known = {subject: EditCase(subject, (Fact("The capital of {} is", subject, "Paris"),)) for subject in subjects}
    return [Task(0, (known[subject],), 1, number) for number, subject in enumerate(subjects, 1)]


def test_every_task_is_done_once_and_its_lines_come_in_their_order(tmp_path: Path) -> None:
    todo = tasks(*"ABCDABCDABCD")
    with Workers(2, partial(noting, tmp_path, {})) as team:
        made = list(team.done(todo))
        assert len({task.number for task, _ in made}) == 12 and len(made) == 24
        assert [line["half"] for _, line in sorted(made, key=lambda pair: pair[0].number)] == [1, 2] * 12  # sorting keeps their order
        assert all(line["number"] == task.number for task, line in made)
        again = list(team.done(tasks("E")))  # what is free stays free for more
        assert [line["case"] for _, line in again] == ["E", "E"]
    done = [path.name.split() for path in tmp_path.iterdir()]
    assert len({pid for _, pid in done}) == 2
    where: dict[str, set[str]] = {}
    for number, pid in done:
        where.setdefault(todo[int(number) - 1].cases[0].id if int(number) <= 12 else "E", set()).add(pid)
    assert sum(len(pids) == 1 for pids in where.values()) >= 3  # the same cases to the same process, but for a last one that was left
    assert not active_children()


@pytest.mark.parametrize(
    ("deed", "error", "says"),
    [
        (plain, ValueError, r"^not this fact\nin a worker:\n(.*\n)*.*in plain\n"),
        (odd, WorkerError, r"^Odd: 1 and 2\nin a worker:\n(.*\n)*.*in odd\n"),
        (
            die,
            WorkerError,
            "worker [12] was stopped by SIGKILL, which is what happens where memory is short; the lines so far are kept: go on with resume",
        ),
        (partial(os._exit, 3), WorkerError, "^worker [12] ended with code 3; the lines so far are kept"),
    ],
)
def test_what_a_worker_comes_to_is_said(tmp_path: Path, deed: Callable[[], object], error: type[Exception], says: str) -> None:
    there: list[Record] = []
    with pytest.raises(error, match=says), Workers(2, partial(noting, tmp_path, {5: deed})) as team:
        for _, line in team.done(tasks(*"ABCDE")):
            there.append(line)
    assert {"case": "E", "number": 5, "half": 1} in there and len(there) >= 7  # of five tasks; one other may have been under way
    assert not active_children()


def beginning(how: Callable[[], object]) -> Work:
    how()
    return noting(Path(), {})


def test_a_worker_that_does_not_begin(tmp_path: Path) -> None:
    """What is wrong is on its stderr, or is raised with the place where it was."""
    with (
        pytest.raises(ValueError, match=r"^not this fact\nin a worker:\n(.*\n)*.*in beginning\n"),
        Workers(1, partial(beginning, plain)) as team,
    ):
        list(team.done(tasks("A")))
    script = tmp_path / "script.py"
    script.write_text("""
from functools import partial
from errata.bench.workers import Workers
from tests.bench.test_workers import beginning, plain, tasks
with Workers(1, partial(beginning, plain)) as team:
    list(team.done(tasks("A")))
""")
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 1 and "ended with code 1 before it began; what it wrote on stderr says why" in run.stderr.splitlines()[-1]


def test_every_task_is_given_out_once_however_many_there_are() -> None:
    """To three who take turns. A search through what is left for each would take hours."""
    known = tasks(*map(str, range(1000)))
    shared = _Shared([task._replace(row=row) for row in range(100) for task in known])
    team: Any = ["one", "other", "third"]
    given = [shared.next(team[i % 3]) for i in range(100_000)]
    assert len({(task.row, task.number) for task in given if task}) == 100_000 and shared.next(team[0]) is None


@pytest.mark.parametrize("how", ["Ctrl-C", "at once", "killed"])
def test_nothing_is_left_of_a_run_that_is_stopped(tmp_path: Path, how: str) -> None:
    """Ctrl-C in a terminal reaches the run and its workers, also while they begin; what kills the run alone, they notice in the middle of
    a task. What was done is kept."""
    command = [sys.executable, "-m", "errata", "bench", "--model", "atlas", "--data", "atlas", "--threads", "1", "--workers", "2"]
    options = ["--methods", "lora", "--limit", "200", "--out", "run"] + (
        ["--protocol", "continual:100"] if how == "killed" else ["--batch", "2"]
    )
    run = subprocess.Popen(
        [*command, *options], cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    path = tmp_path / "run" / RECORDS
    children: list[psutil.Process] = []
    while len(children) < 3:  # the third is multiprocessing's own
        assert run.poll() is None, run.communicate()
        children = psutil.Process(run.pid).children()
    while how == "Ctrl-C" and not (path.exists() and path.read_bytes().count(b"\n") > 4):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    if how == "killed":
        time.sleep(12)
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=5)[1]
    if how != "killed":
        assert run.returncode == 130 and "error: stopped; what was done is kept\n" in told and "Traceback" not in told
    if how == "Ctrl-C":
        assert path.read_bytes().endswith(b"\n")
