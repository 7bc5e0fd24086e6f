"""Run a plan. The single protocol is here: for every row and case edit, apply, measure, revert, and write the line down before the next
begins; blocks of edits in a row are in `errata.bench.continual`, a sequence in `errata.bench.sequence`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata import data, methods
from errata.bench import also, batches, continual, sequence
from errata.bench.folder import RECORDS, RESULTS, STATE, Key, Record, append, claim, key_of, read_records, start, write_whole
from errata.bench.intervals import intervals, rounded
from errata.bench.making import short, watched
from errata.bench.outcomes import outcomes
from errata.bench.plan import NO_OBJECTIVE, Plan, PlanError, Row, Settings, configure, hash_cases, unlabelled
from errata.bench.results import dump, environment, summarise, versions
from errata.edits import Edit
from errata.facts import EditCase, FactError
from errata.lm import LanguageModel, ModelError
from errata.lm import load as load_model
from errata.metrics import summarise as means
from errata.metrics import teacher_forced
from errata.metrics.overfitting import Lens

if TYPE_CHECKING:
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
) -> dict[str, Any]:
    """Run `plan` into the folder `out`; the content of its `results.json`.

    resume: go on with what the folder holds; cases that have a line are not measured again. Without a run in the folder, begin.
    load, cases: the model and the cases where they are not what `plan.model` and `plan.data` name.
    snapshot_every: after so many edits of a sequence its state is written; what came after is done again when the run goes on.

    What a case yields depends on plan, case and seed (in a sequence also on the edits before it), not on when it ran; so however often
    a run is stopped, its results are those of an undisturbed one, up to measured time and memory.

    Raises PlanError if the request is wrong (see `claim`), DataError and ModelError from the loaders. A case whose fact the method
    cannot edit (FactError), or with a text that is too long for the model, becomes a line with the field `error`, is counted as
    `failed`, and is in no mean.
    """
    out = Path(out)
    plan = plan.resolved()
    plan = claim(plan if plan.split or plan.data != "atlas" else replace(plan, split="test"), out, resume)
    rows = [(row, *parts(row.method, row.objective, plan.settings)) for row in plan.rows]
    wanted = also.measurements(plan, data_dir)
    source = None
    if cases is None:
        cases = data.load(plan.data, data_dir=data_dir, split=plan.split)
        source = None if plan.data == "atlas" else data.find(plan.data, data_dir, plan.split)
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        raise PlanError(f"{plan.data} has two cases with the id {next(i for i in ids if ids.count(i) > 1)!r}; records are found by it")
    lm = (load or (lambda: load_model(plan.model, dtype=plan.dtype)))()
    with _threads(plan.threads) as threads:
        plan = replace(plan, batch=plan.batch or batches.fitting(lm))
        plan = replace(plan, threads=threads, data_hash=hash_cases(cases), model_fingerprint=lm.fingerprint, versions=versions())
        drawn = {seed: plan.draw(cases, seed) for seed in plan.seeds}
        elsewhere = {seed: also.elsewhere(cases, chosen, seed) for seed, chosen in drawn.items()} if "drift" in wanted else {}
        for _, method, objective in rows:
            method.start(lm, objective=objective)  # what cannot edit this model says so before anything is written
        start(plan, out)
        records = read_records(out / RECORDS)
        if plan.sequence is not None:
            sequence.fill(plan, rows, drawn, lm, out, records, snapshot_every, progress, wanted, elsewhere)
        elif plan.block is not None:
            continual.fill(plan, rows, drawn, lm, out / RECORDS, records, progress)
        else:
            _fill(rows, drawn, lm, out / RECORDS, records, progress, plan.curves, plan.batch)
    where = environment(plan, str(lm.device), str(lm.dtype).removeprefix("torch."))
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


def _fill(
    rows: list[tuple[Row, Method, Objective]],
    cases: Mapping[int, Sequence[EditCase]],
    lm: LanguageModel,
    path: Path,
    records: dict[Key, Record],
    progress: Progress | None,
    curves: bool = False,
    batch: int = 1,
) -> None:
    """Measure what has no record yet, and append it. cases: those of each seed; curves, batch: see `Plan`."""
    before: dict[str, teacher_forced.Tokens] = {}  # what the unedited model says, once a case, for all rows
    wanted = [key_of(row, case.id) for row, *_ in rows for case in cases[row.seed]]
    total, done = len(wanted), sum(key in records for key in wanted)
    for row, method, objective in rows:
        size = batch if batches.edits_together(method) else 1
        for first in range(0, len(cases[row.seed]), size):
            group = cases[row.seed][first : first + size]
            if all(key_of(row, case.id) in records for case in group):
                continue
            if size == 1:
                lines = [_line(row, method, objective, lm, group[0], before, curves)]
            else:
                lines = batches.lines(row, method, objective, lm, group, before)
            for case, line in zip(group, lines, strict=True):
                if (key := key_of(row, case.id)) not in records:  # a batch that was cut off is made anew, so that the rest is the same
                    records[key] = append(path, line)
                    done += 1
                    if progress:
                        progress(done, total, row.name)


def _line(
    row: Row,
    method: Method,
    objective: Objective,
    lm: LanguageModel,
    case: EditCase,
    before: dict[str, teacher_forced.Tokens],
    curves: bool = False,
) -> Record:
    """The line of one case, or of its failure: a fact that the method cannot edit, or a text that is too long for the model."""
    record: Record = {"method": row.method, "objective": row.objective, "seed": row.seed, "case": case.id}
    try:
        if case.id not in before:
            before |= teacher_forced.unedited(lm, [case])
        return record | _measure(row, method, objective, lm, case, before, curves)
    except (FactError, ModelError) as error:
        return record | {"error": str(error)}


def _measure(
    row: Row,
    method: Method,
    objective: Objective,
    lm: LanguageModel,
    case: EditCase,
    before: Mapping[str, teacher_forced.Tokens],
    curves: bool,
) -> Record:
    """One case: edit the unedited model, measure, and leave it as it was. Raises FactError or ModelError where that cannot be done."""
    seed = row.case_seed(case.id)
    lens = Lens(lm, case) if curves else None

    def make() -> Edit:
        session = method.start(lm, objective=objective, seed=seed)
        if lens:
            session.watch = lens
        return session.complete(case.facts)

    edit, seconds, memory = watched(lm.device, seed, make)
    record: Record = {}
    if lens:
        seconds -= lens.seconds
        record["curves"] = seen.to_dict() if (seen := lens.curves()) else None
    clock = time.perf_counter()
    with edit.applied_():
        (outcome,) = outcomes(lm, [case], before, row.seed)
    return record | {
        **outcome,
        "seconds": {"edit": round(seconds, 6), "measure": round(time.perf_counter() - clock, 6)},
        "peak_memory_mb": round(memory, 1),
        "settings": {"method": edit.method, "objective": edit.objective},
        "diagnostics": short(edit.diagnostics),
    }


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's CPU threads set for the moment; yields their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
