"""The sequential protocol: N edits in a row, measured at checkpoints; it may be stopped at any edit and goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from errata.bench import also
from errata.bench.also import About, Measurement
from errata.bench.folder import STATE, Key, Record, key_of, write_whole
from errata.bench.making import settle, short, watched
from errata.bench.plan import Plan, PlanError, Row
from errata.bench.snapshot import Snapshot
from errata.bench.tasks import Setup, Task
from errata.edits import Delta, Edit, EditError, Stack
from errata.facts import EditCase, Fact, FactError
from errata.lm.capture import submodule
from errata.metrics import generation, noise, probability
from errata.metrics.strips import strips

if TYPE_CHECKING:
    from errata.lm import LanguageModel
    from errata.methods import Method, Session
    from errata.objectives import Objective

TRANSCRIPT_TOKENS = 40
FACT, NOT_FINITE, SOLVER = "fact", "not finite", "solver"
"""Why an edit failed: its fact cannot be used; the weights would not be finite; the method's own linear algebra gave up."""


class Step(NamedTuple):
    """The cases that are edited together; with them `edits` cases of the sequence have been edited."""

    edits: int
    cases: tuple[EditCase, ...]

    @property
    def name(self) -> str:
        """What its line is found by."""
        return f"edit {self.edits}"

    @property
    def facts(self) -> list[Fact]:
        return [fact for case in self.cases for fact in case.facts]


def steps(cases: Sequence[EditCase], batch: int) -> list[Step]:
    """A sequence, `batch` cases at a time; the last step may have fewer."""
    return [Step(min(start + batch, len(cases)), tuple(cases[start : start + batch])) for start in range(0, len(cases), batch)]


def mark_name(edits: int) -> str:
    """What the line of a checkpoint is found by."""
    return f"checkpoint {edits}"


def tasks(
    plan: Plan,
    rows: Sequence[Setup],
    cases: Mapping[int, Sequence[EditCase]],
    records: Mapping[Key, Record],
    elsewhere: Mapping[int, Sequence[str]],
) -> Iterator[Task]:
    """Every sequence of which a line is missing. cases: those of each seed, in the order of their edits; elsewhere: see `Task`."""
    for place, (row, *_) in enumerate(rows):
        whole = steps(cases[row.seed], plan.batch)
        names = [*(step.name for step in whole), *map(mark_name, plan.marks)]
        known = {name: records[key] for name in names if (key := key_of(row, name)) in records}
        if len(known) < len(names):
            missing = sum(len(step.cases) for step in whole if step.name not in known)
            yield Task(place, tuple(cases[row.seed]), missing, known=known, elsewhere=tuple(elsewhere.get(row.seed, ())))


class Sequential:
    """Does sequences on one model, which is the unedited one between them and afterwards.

    wanted: what is measured beside the cases. out: the run folder, for snapshots and for what the unedited model says.
    snapshot_every: what is done again after a stop is at most so many edits. Raises PlanError if the model is not the unedited one before.
    """

    def __init__(
        self, plan: Plan, rows: Sequence[Setup], lm: LanguageModel, out: Path, wanted: Mapping[str, Measurement], snapshot_every: int
    ) -> None:
        if Stack.of(lm).active:
            raise PlanError(f"{lm.name} has edits applied, and a sequence begins at the unedited model; revert them first")
        self.plan, self.rows, self.lm = plan, rows, lm
        self.out, self.wanted, self.snapshot_every = out, wanted, snapshot_every
        self.said: list[str] | None = None

    def __call__(self, task: Task) -> Generator[Record]:
        row, method, objective = self.rows[task.row]
        sequence = _Sequence(self.plan, row, task, self.lm, self.out, self.wanted)
        sequence.before = _unedited(self.lm, task.cases, self.out / STATE / f"unedited-{row.seed}.json")
        sequence.aside = also.unedited(self.wanted, self.lm, About(task.cases, task.elsewhere), row.seed, self.out / STATE)
        if self.said is None:
            self.said = self.lm.generate(self.plan.transcripts, TRANSCRIPT_TOKENS, stop_at_newline=False)
        sequence.said = self.said
        yield from sequence.run(method, objective, self.snapshot_every)


def _unedited(lm: LanguageModel, cases: Sequence[EditCase], path: Path) -> dict[str, Any]:
    """What the unedited model says about a seed's cases: for all of them at once, once for all rows, however often the run is stopped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(probability.unedited(lm, cases), ensure_ascii=False))
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


class _Sequence:
    """One row of a plan: a method under a seed, from the unedited model to the last checkpoint.

    known: the lines that are there, by step. before, aside, said: of the unedited model, what it says about the cases, what is measured
    beside them, and how it goes on after the plan's prompts.
    """

    before: Mapping[str, Any]
    aside: Mapping[str, Any]
    said: Sequence[str]

    def __init__(self, plan: Plan, row: Row, task: Task, lm: LanguageModel, out: Path, wanted: Mapping[str, Measurement]) -> None:
        self.plan, self.row, self.lm, self.wanted = plan, row, lm, wanted
        self.steps, self.known, self.elsewhere = steps(task.cases, plan.batch), dict(task.known), task.elsewhere
        self.state = out / STATE / f"{quote(row.name, safe='@+=')}.{row.seed}.pt"  # where its snapshot lies

    def run(self, method: Method, objective: Objective, snapshot_every: int) -> Iterator[Record]:
        """Go on from the last snapshot; yields the lines that are not there yet.

        Steps that have one are done again where the snapshot is older: with the same seeds, so with the same result.
        """
        try:
            with torch.random.fork_rng([self.lm.device] if self.lm.device.type == "cuda" else []):
                torch.manual_seed(self.row.seed)
                session = method.start(self.lm, objective=objective, seed=self.row.seed)
            trace = noise.Trace()
            begun = kept = self._restore(session, trace)
            for step in self.steps:
                if step.edits < begun:
                    continue
                if step.edits > begun:
                    line = self._step(session, trace, step)
                    if step.name not in self.known:
                        yield self._new(line)
                marked = step.edits in self.plan.marks
                if step.edits > begun and (marked or step.edits - kept >= snapshot_every):
                    Snapshot.take(self.lm, step.edits, session.state_dict(), trace.state_dict()).save(self.state)
                    kept = step.edits
                if marked and mark_name(step.edits) not in self.known:
                    yield self._new(self._checkpoint(session, trace, step.edits))
        finally:
            Stack.of(self.lm).clear()
        self.state.unlink(missing_ok=True)

    def _new(self, line: Record) -> Record:
        self.known[line["step"]] = line
        return line

    def _restore(self, session: Session, trace: noise.Trace) -> int:
        """The number of edits from which to go on. A snapshot beyond a line that is missing would leave it missing: begin again."""
        kept = Snapshot.load(self.state)
        if kept is None:
            return 0
        there = [step.name for step in self.steps if step.edits <= kept.edits]
        there += [mark_name(mark) for mark in self.plan.marks if mark < kept.edits]
        if not all(name in self.known for name in there):
            return 0
        try:
            session.load_state_dict(kept.session)
        except KeyError as error:
            raise PlanError(f"{self.state} is of another errata (no {error} in it); remove it, and the sequence begins again") from error
        trace.load_state_dict(kept.trace)
        kept.restore(self.lm)
        return kept.edits

    def _step(self, session: Session, trace: noise.Trace, step: Step) -> Record:
        """Edit, apply, and measure where there is no line yet."""
        seed = self.row.case_seed("\n".join(case.id for case in step.cases))
        line = self._line(step.name) | {"cases": [case.id for case in step.cases]}
        try:
            made = watched(self.lm.device, seed, lambda: session.edit(step.facts))
            line |= self._apply(trace, made.edit, step.facts)
            line |= {"peak_memory_mb": round(made.memory, 1), "diagnostics": short(made.edit.diagnostics)}
            line["seconds"]["edit"] = round(made.seconds, 6)
        except FactError as error:
            line |= {"error": str(error), "failure": FACT}
        except FloatingPointError as error:
            line |= {"error": str(error), "failure": NOT_FINITE}
        except (EditError, LinAlgError) as error:
            line |= {"error": str(error), "failure": SOLVER}
        if step.name not in self.known and self.plan.measure != "after-sequence" and line.get("failure") != FACT:
            line["outcomes"] = self._outcomes(step.cases)
        return line

    def _apply(self, trace: noise.Trace, edit: Edit, facts: list[Fact]) -> Record:
        """Raises FloatingPointError if that leaves weights that are not finite; then nothing is applied."""
        paths = list(dict.fromkeys(delta.path for delta in edit.deltas))
        missing = [path for path in paths if path not in edit.keys]
        keys = edit.keys | (noise.keys_of(self.lm, facts, missing) if missing else {})  # before it is applied
        clock = time.perf_counter()
        settle(self.lm, edit)
        seconds = time.perf_counter() - clock
        trace.add(edit, keys)
        return {"seconds": {"apply": round(seconds, 6)}}

    def _checkpoint(self, session: Session, trace: noise.Trace, edits: int) -> Record:
        """Measure every case so far, with what the method does at the end; the last checkpoint also says how the weights ended."""
        last = edits == self.plan.marks[-1]
        line = self._line(mark_name(edits)) | {"edits": edits}
        clock = time.perf_counter()
        try:
            extra = session.finish()
        except (EditError, LinAlgError) as error:  # nothing could be written, or its singular values cannot be found
            extra, line["finish_error"] = [], str(error)  # what would be measured now is another method's model
        finished = time.perf_counter()
        line["noise"] = {
            path: {"noise": _digits(found.noise), "k_beta": _digits(found.k_beta)} for path, found in trace.measure(extra=extra).items()
        }
        with self._with(extra):
            if self.plan.measure != "after-each" and "finish_error" not in line:
                line["outcomes"] = self._outcomes(self._usable(edits), written=last)
            if self.wanted and "finish_error" not in line:
                about = About(self._usable(edits), self.elsewhere)
                line["also"] = also.measured(self.wanted, self.lm, about, self.aside, last)
            if last:
                line["weights_sha256"] = self._sha256()
                line["settings"] = {"method": session.method.to_dict(), "objective": session.record()}
                after = self.lm.generate(self.plan.transcripts, TRANSCRIPT_TOKENS, stop_at_newline=False)
                line["transcripts"] = [
                    {"prompt": prompt, "before": old, "after": new}
                    for prompt, old, new in zip(self.plan.transcripts, self.said, after, strict=True)
                ]
        line["seconds"] = {"finish": round(finished - clock, 6), "measure": round(time.perf_counter() - finished, 6)}
        return line

    def _with(self, extra: list[Delta]) -> AbstractContextManager[object]:
        return Edit(self.lm, extra, [], {"name": "finish"}).applied_() if extra else nullcontext()

    def _usable(self, edits: int) -> list[EditCase]:
        """The cases so far, without those whose facts cannot be edited by this method. A case whose edit broke down is asked about too."""
        done = [step for step in self.steps if step.edits <= edits]
        return [case for step in done if self.known[step.name].get("failure") != FACT for case in step.cases]

    def _outcomes(self, cases: Sequence[EditCase], written: bool = False) -> dict[str, Record]:
        """Case id -> what the model as it is scores there; `written`: with what it writes behind the edit prompts (EVALUATION §3): the
        share that is right as "generation", the transcripts, and the strips of the right answers."""
        scores = [score.to_dict() for score in probability.score_all(self.lm, cases, self.before)]
        outcomes = {case.id: {k: v for k, v in score.items() if k != "id"} for case, score in zip(cases, scores, strict=True)}
        if written:
            for said, strip in zip(generation.score_all(self.lm, cases), strips(self.lm, cases), strict=True):
                told = said.to_dict()
                outcomes[said.id] |= {"generation": told["exact"], "transcripts": told["transcripts"], "strips": strip}
        return outcomes

    def _sha256(self) -> str:
        """Over the touched weights as they are, then the memory's tensors: path or name, type and bytes of each, in their order."""
        digest, stack = hashlib.sha256(), Stack.of(self.lm)
        named = {path: self._weight(path) for path in stack.touched}
        named |= dict(sorted(stack.memory.tensors().items())) if stack.memory is not None else {}
        for name, tensor in named.items():
            digest.update(f"{name} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()

    def _weight(self, path: str) -> Tensor:
        weight: Tensor = submodule(self.lm.model, path).weight  # type: ignore[assignment]  # an edit has been applied there
        return weight.detach()

    def _line(self, step: str) -> Record:
        return {"method": self.row.method, "objective": self.row.objective, "seed": self.row.seed, "step": step}


def _digits(value: float | None) -> float | None:
    """Ten digits: beyond them is the order of summation, and noise comes in any size."""
    return None if value is None else float(f"{value:.10g}")
