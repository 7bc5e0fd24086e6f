"""The protocol of single edits: each case from the unedited model, measured, and the model as it was again."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from errata.bench import batches
from errata.bench.folder import Key, Record, key_of
from errata.bench.making import short, watched
from errata.bench.outcomes import outcomes
from errata.bench.tasks import Setup, Task
from errata.edits import Edit
from errata.facts import EditCase, FactError
from errata.lm import LanguageModel, ModelError
from errata.metrics import teacher_forced
from errata.metrics.overfitting import Lens

if TYPE_CHECKING:
    from errata.bench.plan import Plan, Row
    from errata.methods import Method
    from errata.objectives import Objective


def tasks(plan: Plan, rows: Sequence[Setup], cases: Mapping[int, Sequence[EditCase]], records: Mapping[Key, Record]) -> Iterator[Task]:
    """Cases, or so many of them as are edited side by side, of which a line is missing. cases: those of each seed."""
    for number, (row, method, _) in enumerate(rows):
        size = plan.batch if batches.edits_together(method) else 1
        for first in range(0, len(cases[row.seed]), size):
            group = tuple(cases[row.seed][first : first + size])
            if missing := sum(key_of(row, case.id) not in records for case in group):
                yield Task(number, group, missing)  # a batch that was cut off is made anew, so that the rest is the same


class Single:
    """Does such tasks on one model."""

    def __init__(self, plan: Plan, rows: Sequence[Setup], lm: LanguageModel) -> None:
        self.plan, self.rows, self.lm = plan, rows, lm
        self.before = batches.Before()

    def __call__(self, task: Task) -> Generator[Record]:
        row, method, objective = self.rows[task.row]
        if self.plan.batch > 1 and batches.edits_together(method):
            yield from batches.lines(row, method, objective, self.lm, task.cases, self.before)
        else:
            yield from (line(row, method, objective, self.lm, case, self.before.said, self.plan.curves) for case in task.cases)


def line(
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
