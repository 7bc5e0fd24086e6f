"""Single edits in batches: what each case yields is what it yields alone, up to rounding; only it takes less time.

Which cases run together is fixed by the plan (so many in a row of its list), never by what is measured already: a run that was stopped in
the middle of a batch makes it once more and keeps the lines that it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import torch

from errata.bench.making import short, wait_for
from errata.bench.memory import watch_peak
from errata.bench.outcomes import outcomes
from errata.edits.side_by_side import SideBySide, can_stand_beside, lowest
from errata.facts import FactError
from errata.lm import ModelError
from errata.lm.resume import Below, can_resume
from errata.methods.base import Method
from errata.metrics import teacher_forced
from errata.metrics.teacher_forced import wide

if TYPE_CHECKING:
    from errata.bench.folder import Record
    from errata.bench.plan import Row
    from errata.edits import Edit
    from errata.facts import EditCase
    from errata.lm import LanguageModel
    from errata.objectives import Objective

MOST = 64
"""Edits in a batch: beyond it nothing is gained on a CPU, and a run that is stopped loses more."""
TOKENS = 64
"""Of an edit's text, for the memory it takes."""
ROWS = 128
"""Texts in a batch of the measurement."""
KEPT = 2**28
"""Bytes of what runs before an edit of one place can be felt, for its own measurement and the rows to come."""


def edits_together(method: object) -> bool:
    """Whether a method optimises several edits side by side."""
    return isinstance(method, Method) and type(method).many is not Method.many


def fitting(lm: LanguageModel, workers: int = 1) -> int:
    """How many edits fit into half of the memory that is free now, 1 to MOST, where so many workers with a model each share it.

    An edit is taken for six matrices of an MLP down-projection's shape in the precision of changes (RECT leaves one in each of five layers;
    FT has two while it trains one), and what TOKENS tokens leave behind in each layer for the way back: 16 vectors of the hidden size and
    4 of the MLP's. LoRA takes less; methods that train more need `batch` in the plan.
    """
    free = torch.cuda.mem_get_info(lm.device)[0] if lm.device.type == "cuda" else psutil.virtual_memory().available
    d, inner = lm.anatomy.hidden_size, lm.anatomy.key_size
    one = 6 * max(4, lm.dtype.itemsize) * d * inner + TOKENS * len(lm.anatomy.layers) * (16 * d + 4 * inner) * lm.dtype.itemsize
    others: int = (workers - 1) * sum(parameter.nbytes for parameter in lm.model.parameters())
    return max(1, min(MOST, (free - others) // 2 // one // workers))


def even(edits: int, most: int) -> int:
    """The size of batches of about one size, as few as `most` allows."""
    return max(1, math.ceil(edits / max(1, math.ceil(edits / most))))


class Before:
    """What is known of the unedited model, once for all rows: what it says, and what runs in it before an edit can be felt.

    said: case id -> its answers to the case's locality probes.
    """

    def __init__(self) -> None:
        self.said: dict[str, teacher_forced.Tokens] = {}
        self._below: dict[tuple[int, bool], Below] = {}

    def below(self, lm: LanguageModel, edits: Sequence[Edit]) -> Below | None:
        """What runs before one of the edits can be felt; None where nothing is spared."""
        felt = lowest(lm, edits)
        if felt is None or not can_resume(lm):
            return None
        layer, down = felt[0], felt[1] and lm.anatomy.writes_straight
        if not layer and not down:
            return None
        return self._below.setdefault((layer, down), Below(lm, layer, down, KEPT))


def lines(row: Row, method: Method, objective: Objective, lm: LanguageModel, cases: Sequence[EditCase], before: Before) -> list[Record]:
    """The lines of cases that are edited together, in their order; a case that fails has a line with its `error`, and hurts no other.

    before: it is filled up. The seconds are each case's share, the memory is that of the whole batch.
    """
    seeds = [row.case_seed(case.id) for case in cases]
    peak, clock = watch_peak(lm.device), time.perf_counter()
    made = method.many(lm, [case.facts for case in cases], seeds, objective)
    wait_for(lm.device)
    editing, memory = (time.perf_counter() - clock) / len(cases), peak()
    edits = {case.id: edit for case, edit in zip(cases, made, strict=True) if not isinstance(edit, FactError)}
    wrong = {case.id: str(edit) for case, edit in zip(cases, made, strict=True) if isinstance(edit, FactError)}
    measured = _measured(lm, [case for case in cases if case.id in edits], edits, before, row.seed, wrong)
    found: list[Record] = []
    for case in cases:
        record: Record = {"method": row.method, "objective": row.objective, "seed": row.seed, "case": case.id}
        if case.id in wrong:
            found.append(record | {"error": wrong[case.id]})
            continue
        outcome, seconds = measured[case.id]
        edit = edits[case.id]
        found.append(
            record
            | outcome
            | {
                "seconds": {"edit": round(editing, 6), "measure": round(seconds, 6)},
                "peak_memory_mb": round(memory, 1),
                "settings": {"method": edit.method, "objective": edit.objective},
                "diagnostics": short(edit.diagnostics),
            }
        )
    return found


def _measured(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    edits: Mapping[str, Edit],
    before: Before,
    seed: int,
    wrong: dict[str, str],
) -> dict[str, tuple[dict[str, Any], float]]:
    """Case id -> its outcome and the seconds it took; what cannot be measured goes into `wrong`. Cases with questions go one by
    one; in half precision all do, with each edit written into the weights."""
    beside = [case for case in cases if wide(lm) and not case.questions and can_stand_beside(edits[case.id])]
    below = before.below(lm, [edits[case.id] for case in beside])
    wrong |= _unedited(lm, cases, before.said, below)
    beside = [case for case in beside if case.id not in wrong]
    found: dict[str, tuple[dict[str, Any], float]] = {}
    if len(beside) > 1:
        clock = time.perf_counter()
        with suppress(FactError, ModelError):  # a text that is too long: one by one the others do not suffer from it
            rows = SideBySide(lm, [edits[case.id] for case in beside]).rows
            made = outcomes(lm, beside, before.said, seed, ROWS, rows, below)
            seconds = (time.perf_counter() - clock) / len(beside)
            found = {case.id: (outcome, seconds) for case, outcome in zip(beside, made, strict=True)}
    for case in (case for case in cases if case.id not in found and case.id not in wrong):
        clock = time.perf_counter()
        try:
            with edits[case.id].applied_():
                (outcome,) = outcomes(lm, [case], before.said, seed)
        except (FactError, ModelError) as error:
            wrong[case.id] = str(error)
            continue
        found[case.id] = outcome, time.perf_counter() - clock
    return found


def _unedited(lm: LanguageModel, cases: Sequence[EditCase], said: dict[str, teacher_forced.Tokens], below: Below | None) -> dict[str, str]:
    """Ask the unedited model what it was not asked yet. Case id -> why it cannot be asked."""
    missing = [case for case in cases if case.id not in said]
    try:
        said |= teacher_forced.unedited(lm, missing, ROWS, below)
        return {}
    except ModelError:  # one of the texts is too long: which one?
        wrong = {}
        for case in missing:
            try:
                said |= teacher_forced.unedited(lm, [case])
            except ModelError as error:
                wrong[case.id] = str(error)
        return wrong
