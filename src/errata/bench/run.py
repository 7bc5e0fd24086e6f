"""Run a plan: its tasks, here or in several processes, and every line on the disk before the task goes on.

What a task does is in `errata.bench.single`, `errata.bench.continual` and `errata.bench.sequence`."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata import data, methods
from errata.bench import also, batches, continual, sequence, single
from errata.bench.folder import (
    RECORDS,
    RESULTS,
    STATE,
    Key,
    Record,
    append,
    claim,
    key_of,
    read_records,
    said_of,
    start,
    write_whole,
)
from errata.bench.intervals import intervals, rounded
from errata.bench.outcomes import outcomes
from errata.bench.plan import NO_OBJECTIVE, Plan, PlanError, Settings, configure, hash_cases, unlabelled
from errata.bench.results import dump, environment, summarise, versions
from errata.bench.tasks import Setup, Task, Work
from errata.bench.workers import Workers, sendable
from errata.lm import load as load_model
from errata.metrics import summarise as means
from errata.metrics import teacher_forced

if TYPE_CHECKING:
    from errata.bench.also import Measurement
    from errata.edits import Edit
    from errata.facts import EditCase
    from errata.lm import LanguageModel
    from errata.methods import Method
    from errata.objectives import Objective

Progress = Callable[[int, int, str], None]
"""(done, of, what): called after each case."""


def run(
    plan: Plan,
    out: str | Path,
    *,
    resume: bool = False,
    data_dir: str | Path | None = None,
    load: Callable[[], LanguageModel] | None = None,
    cases: Sequence[EditCase] | None = None,
    progress: Progress | None = None,
    snapshot_every: int = 50,
    workers: int = 1,
) -> dict[str, Any]:
    """Run `plan` into the folder `out`; the content of its `results.json`.

    resume: go on with what the folder holds; cases that have a line are not measured again. Without a run in the folder, begin.
    load, cases: the model and the cases where they are not what `plan.model` and `plan.data` name.
    snapshot_every: after so many edits of a sequence its state is written; what came after is done again when the run goes on.
    workers: processes that share the work, each with a model of its own and, where neither the plan nor the run that goes on says a
        number, an even share of the threads.
        Each takes single edits (as many as are made side by side), a block or a whole sequence at a time, and then the next.

    What a case yields depends on plan, case and seed (in a sequence also on the edits before it), not on when it ran; so however often
    a run is stopped, its results are those of an undisturbed one, up to measured time and memory.

    Raises PlanError if the request is wrong (see `claim`), WorkerError where a worker was killed, DataError and ModelError from the
    loaders. A case whose fact the method cannot edit (FactError), or with a text that is too long for the model, becomes a line with the
    field `error`, is counted as `failed`, and is in no mean; in a sequence a text that is too long ends the run.
    """
    out = Path(out)
    plan = plan.resolved()
    plan = claim(plan if plan.split or plan.data != "atlas" else replace(plan, split="test"), out, resume)
    if workers < 1:
        raise PlanError(f"workers must be at least 1 (got {workers})")
    if workers > 1:
        sendable(load)
    rows = _rows(plan)
    wanted = also.measurements(plan, data_dir)
    source = None
    if cases is None:
        cases = data.load(plan.data, data_dir=data_dir, split=plan.split)
        source = None if plan.data == "atlas" else data.find(plan.data, data_dir, plan.split)
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        raise PlanError(f"{plan.data} has two cases with the id {next(i for i in ids if ids.count(i) > 1)!r}; records are found by it")
    lm = _loaded(plan, load)
    with _threads(plan.threads or max(1, torch.get_num_threads() // workers)) as threads:
        drawn = {seed: plan.draw(cases, seed) for seed in plan.seeds}
        size = plan.batch or batches.even(max(map(len, drawn.values())), batches.fitting(lm, workers))
        plan = replace(plan, batch=size, threads=threads)
        plan = replace(plan, data_hash=hash_cases(cases), model_fingerprint=lm.fingerprint, versions=versions())
        for _, method, objective in rows:
            method.start(lm, objective=objective)  # what cannot edit this model says so before anything is written
        work = _work(plan, rows, lm, out, snapshot_every, wanted)
        start(plan, out)
        records = read_records(out / RECORDS)
        if plan.sequence is not None:
            elsewhere = {seed: also.elsewhere(cases, chosen, seed) for seed, chosen in drawn.items()} if "drift" in wanted else {}
            todo = list(sequence.tasks(plan, rows, drawn, records, elsewhere))
        else:
            todo = list((continual if plan.block is not None else single).tasks(plan, rows, drawn, records))
        where = environment(plan, str(lm.device), str(lm.dtype).removeprefix("torch."))
        if workers > 1 and len(todo) > 1:
            device = lm.device.type
            del lm, work  # each has its own
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            begin = partial(_begin, plan, out, snapshot_every, data_dir, load)
            with Workers(min(workers, len(todo)), begin) as team:
                _write(team.done(todo), todo, rows, drawn, out / RECORDS, records, progress)
        else:
            with closing(_one_by_one(todo, work)) as made:
                _write(made, todo, rows, drawn, out / RECORDS, records, progress)
    if source is not None:
        where |= {"data_file": source.name, "data_file_sha256": data.digest(source)}
    if isinstance(asks := wanted.get("ability"), also.Asked):
        where |= {"ability_sha256": asks.digests()}
    asked = {seed: [case.id for case in chosen] for seed, chosen in drawn.items()}
    if plan.sequence is None:  # the data's order: a table does not depend on the order of the edits within it
        place = {case: number for number, case in enumerate(ids)}
        asked = {seed: sorted(chosen, key=place.__getitem__) for seed, chosen in asked.items()}
    results = summarise(plan, asked, records, where)
    write_whole(out / RESULTS, dump(results))
    shutil.rmtree(out / STATE, ignore_errors=True)
    return results


def parts(method: str, objective: str, settings: Settings) -> tuple[Method, Objective]:
    """A method and an objective by name, with what `settings` says for the method, the objective, and this pair.

    A labelled method ("deltaedit@eta=2") begins with the settings of the method without its label.

    The objective begins with the method's own values (the papers' ε differs from method to method). Raises ValueError for an unknown
    name, PlanError for a setting that does not fit.
    """
    plain = unlabelled(method)
    editor = configure(methods.get(plain), {**settings.get(plain, {}), **settings.get(method, {})}, method)
    pairs = {**settings.get(f"{plain}+{objective}", {}), **settings.get(f"{method}+{objective}", {})}
    chosen = {**settings.get(objective, {}), **pairs}
    if objective == NO_OBJECTIVE and not editor.optimises:
        return editor, editor.objective("ce")  # what a session is given where nothing is asked for; nobody reads it
    return editor, configure(editor.objective(objective), chosen, objective)


def evaluate(lm: LanguageModel, cases: Sequence[EditCase], edit: Edit | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The metrics of a model on cases as it is, or with `edit` applied: {"n", "metrics", "intervals"}, in per cent.

    Without an edit, reliability says how often the new answers are there before any editing, and there is no locality.
    """
    found = []
    for done, case in enumerate(cases, 1):
        before = teacher_forced.unedited(lm, [case]) if edit else None
        with edit.applied_() if edit else nullcontext():
            found += outcomes(lm, [case], before)
        if progress:
            progress(done, len(cases), case.id)
    return {"n": len(found), "metrics": rounded(means(found)), "intervals": intervals(found)}


def _write(
    made: Iterable[tuple[Task, Record]],
    todo: Sequence[Task],
    rows: Sequence[Setup],
    cases: Mapping[int, Sequence[EditCase]],
    path: Path,
    records: dict[Key, Record],
    progress: Progress | None,
) -> None:
    """Append each line that is new."""
    total = sum(len(cases[row.seed]) for row, *_ in rows)
    done = total - sum(task.missing for task in todo)
    for task, line in made:
        row = rows[task.row][0]
        if (key := key_of(row, said_of(line))) in records:  # of a batch that was cut off
            continue
        records[key] = append(path, line)
        if new := len(line["cases"]) if "cases" in line else "case" in line:  # a checkpoint is none
            done += new
            if progress:
                progress(done, total, row.name)


def _one_by_one(todo: Iterable[Task], work: Work) -> Generator[tuple[Task, Record]]:
    for task in todo:
        with closing(work(task)) as lines:  # whatever becomes of them, the model is left as it was
            for line in lines:
                yield task, line


def _work(plan: Plan, rows: Sequence[Setup], lm: LanguageModel, out: Path, snapshot_every: int, wanted: Mapping[str, Measurement]) -> Work:
    """What does a plan's tasks on a model. Raises PlanError if the model has edits applied and the plan edits in a row."""
    if plan.sequence is not None:
        return sequence.Sequential(plan, rows, lm, out, wanted, snapshot_every)
    return continual.Continual(plan, rows, lm) if plan.block is not None else single.Single(plan, rows, lm)


def _begin(plan: Plan, out: Path, snapshot_every: int, data_dir: str | Path | None, load: Callable[[], LanguageModel] | None) -> Work:
    """The same in a process of its own."""
    torch.set_num_threads(plan.threads or 1)
    lm = _loaded(plan, load)
    if lm.fingerprint != plan.model_fingerprint:
        raise PlanError(f"{plan.model} is not the model that the run began with: its fingerprint is {lm.fingerprint}")
    return _work(plan, _rows(plan), lm, out, snapshot_every, also.measurements(plan, data_dir))


def _loaded(plan: Plan, load: Callable[[], LanguageModel] | None) -> LanguageModel:
    return load() if load else load_model(plan.model, dtype=plan.dtype)


def _rows(plan: Plan) -> list[Setup]:
    return [(row, *parts(row.method, row.objective, plan.settings)) for row in plan.rows]


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's CPU threads set for the moment; yields their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
