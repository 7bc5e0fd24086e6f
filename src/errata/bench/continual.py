"""The continual protocol (OVERTONE §4.3): T edits in a row, measured, and again from the unedited model; T = 1 is single editing."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from errata.bench.folder import Key, Record, key_of
from errata.bench.making import settle, short, wait_for, watched
from errata.bench.outcomes import outcomes
from errata.bench.plan import Plan, PlanError, Row
from errata.bench.sequence import FACT, NOT_FINITE, SOLVER
from errata.bench.tasks import Setup, Task
from errata.edits import Edit, EditError, Stack
from errata.facts import EditCase, Fact, FactError
from errata.lm import ModelError
from errata.metrics import teacher_forced

if TYPE_CHECKING:
    from errata.lm import LanguageModel
    from errata.methods import Method, Session
    from errata.objectives import Objective

FINISH, TEXT = "finish", "text"
"""Beside the reasons of a sequence: what the method does at the end could not be done, so there is no model of its own to measure; and a
text of the case is too long for the model."""


def blocks(cases: Sequence[EditCase], size: int) -> list[tuple[EditCase, ...]]:
    """What is edited in a row, `size` cases at a time; the last block may have fewer."""
    return [tuple(cases[start : start + size]) for start in range(0, len(cases), size)]


def tasks(plan: Plan, rows: Sequence[Setup], cases: Mapping[int, Sequence[EditCase]], records: Mapping[Key, Record]) -> Iterator[Task]:
    """Every block of which a line is missing. cases: those of each seed, in the order of their edits."""
    assert plan.block is not None  # the protocol is continual
    for place, (row, *_) in enumerate(rows):
        for number, block in enumerate(blocks(cases[row.seed], plan.block), 1):
            if missing := sum(key_of(row, case.id) not in records for case in block):
                yield Task(place, block, missing, number)


class Continual:
    """Does blocks on one model, which is the unedited one between them and afterwards.

    A block's lines come when it is measured, so what is done again after a stop is one block, with the same seeds.
    Raises PlanError if the model is not the unedited one before.
    """

    def __init__(self, plan: Plan, rows: Sequence[Setup], lm: LanguageModel) -> None:
        if Stack.of(lm).active:
            raise PlanError(f"{lm.name} has edits applied, and continual editing begins at the unedited model; revert them first")
        self.plan, self.rows, self.lm = plan, rows, lm
        self.before: dict[str, teacher_forced.Tokens | ModelError] = {}  # what the unedited model says, once a case, for all rows

    def __call__(self, task: Task) -> Generator[Record]:
        self.before |= {case.id: _before(self.lm, case) for case in task.cases if case.id not in self.before}
        yield from _run(*self.rows[task.row], self.lm, task.cases, task.number, self.before, self.plan.measure)


def _before(lm: LanguageModel, case: EditCase) -> teacher_forced.Tokens | ModelError:
    try:
        return teacher_forced.unedited(lm, [case])[case.id]
    except ModelError as error:
        return error


def _run(
    row: Row,
    method: Method,
    objective: Objective,
    lm: LanguageModel,
    block: Sequence[EditCase],
    number: int,
    known: Mapping[str, teacher_forced.Tokens | ModelError],
    measure: str,
) -> list[Record]:
    """One block, from the unedited model and back to it; a line for each case, in the order of the edits."""
    before = {case: tokens for case, tokens in known.items() if not isinstance(tokens, ModelError)}
    seed = row.case_seed("\n".join(case.id for case in block))
    begun: list[Session] = []

    def edit(facts: Sequence[Fact]) -> Edit:
        if not begun:  # with the first edit, to whose time and random numbers it belongs as in single editing
            begun.append(method.start(lm, objective=objective, seed=seed))
        return begun[0].edit(facts)

    lines: list[Record] = []
    try:
        for place, case in enumerate(block, 1):
            line: Record = {"method": row.method, "objective": row.objective, "seed": row.seed, "case": case.id}
            line |= {"block": number, "place": place}
            lines.append(line)
            if isinstance(unasked := known[case.id], ModelError):
                line |= {"error": str(unasked), "failure": TEXT}
                continue
            try:
                made = watched(lm.device, row.case_seed(case.id), lambda facts=case.facts: edit(facts))  # type: ignore[misc]  # bound now
                settle(lm, made.edit)
            except FactError as error:
                line |= {"error": str(error), "failure": FACT}
                continue
            except ModelError as error:
                line |= {"error": str(error), "failure": TEXT}
                continue
            except FloatingPointError as error:
                line |= {"error": str(error), "failure": NOT_FINITE}
            except (EditError, LinAlgError) as error:
                line |= {"error": str(error), "failure": SOLVER}
            else:
                line |= {
                    "seconds": {"edit": made.seconds},
                    "peak_memory_mb": round(made.memory, 1),
                    "settings": {"method": made.edit.method, "objective": made.edit.objective},
                    "diagnostics": short(made.edit.diagnostics),
                }
                del made  # the stack keeps what it needs
            if measure != "after-sequence":
                (line["after_each"],) = _asked(lm, [case], before, row.seed)
        _measure(lm, begun[0] if begun else None, block, lines, before, measure, row.seed)
    finally:
        Stack.of(lm).clear()
    return lines


def _measure(
    lm: LanguageModel,
    session: Session | None,
    block: Sequence[EditCase],
    lines: Sequence[Record],
    before: Mapping[str, teacher_forced.Tokens],
    measure: str,
    seed: int,
) -> None:
    """Add to the lines what the model scores after the last edit, with what the method does at the end of a sequence.

    A case whose edit broke down is asked about too: so the model answers after T edits of which that one came to nothing.
    """
    edited = [line for line in lines if "error" not in line]
    asked = [(case, line) for case, line in zip(block, lines, strict=True) if line.get("failure") not in (FACT, TEXT)]
    clock = time.perf_counter()
    try:
        extra = session.finish() if session and edited and measure != "after-each" else []
        wait_for(lm.device)
        finished = time.perf_counter()
        with Edit(lm, extra, [], {"name": "finish"}).applied_() if extra else nullcontext():
            found = [] if measure == "after-each" else _asked(lm, [case for case, _ in asked], before, seed)
    except (EditError, LinAlgError) as error:  # nothing could be written, or its singular values cannot be found
        for _, line in asked:
            line |= {"error": str(error), "failure": FINISH}
        return
    for line in edited:
        line["seconds"] = {
            "edit": round(line["seconds"]["edit"] + (finished - clock) / len(edited), 6),
            "measure": round((time.perf_counter() - finished) / len(edited), 6),
        }
    if measure == "after-each":
        found = [line.pop("after_each") for _, line in asked]
    for (_, line), outcome in zip(asked, found, strict=True):
        line |= outcome


def _asked(lm: LanguageModel, cases: Sequence[EditCase], before: Mapping[str, teacher_forced.Tokens], seed: int) -> list[Record]:
    """The outcomes of cases; of one with a text that is too long for the model, that."""
    if not cases:
        return []
    try:
        return outcomes(lm, cases, before, seed)
    except ModelError as error:
        if len(cases) == 1:
            return [{"error": str(error), "failure": TEXT}]
        return [one for case in cases for one in _asked(lm, [case], before, seed)]
