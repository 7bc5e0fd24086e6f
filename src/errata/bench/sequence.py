"""The sequential protocol: N edits in a row, measured at checkpoints; it may be stopped at any edit and goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from errata.bench import also
from errata.bench.also import About, Measurement
from errata.bench.folder import RECORDS, STATE, Key, Record, append, key_of, write_whole
from errata.bench.making import settle, short, watched
from errata.bench.plan import Plan, PlanError, Row
from errata.bench.snapshot import Snapshot
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


def fill(
    plan: Plan,
    rows: Sequence[tuple[Row, Method, Objective]],
    cases: Mapping[int, Sequence[EditCase]],
    lm: LanguageModel,
    out: Path,
    records: dict[Key, Record],
    snapshot_every: int,
    progress: Callable[[int, int, str], None] | None,
    wanted: Mapping[str, Measurement],
    elsewhere: Mapping[int, Sequence[str]],
) -> None:
    """Run every sequence that has no last line yet, and append its lines. cases: those of each seed, in their order.

    wanted, elsewhere: what is measured beside the cases, and the prompts about other subjects for it, of each seed.

    snapshot_every: what is done again after a stop is at most so many edits. The model is the unedited one between rows, and afterwards.
    Raises PlanError if it is not the unedited one before.
    """
    if Stack.of(lm).active:
        raise PlanError(f"{lm.name} has edits applied, and a sequence begins at the unedited model; revert them first")
    sequences = [
        _Sequence(plan, row, steps(cases[row.seed], plan.batch), lm, out, records, wanted, elsewhere.get(row.seed, ())) for row, *_ in rows
    ]
    total = sum(len(cases[row.seed]) for row, *_ in rows)
    done = sum(len(step.cases) for sequence in sequences for step in sequence.steps if sequence.has(step.name))
    said: list[str] | None = None
    for sequence, (row, method, objective) in zip(sequences, rows, strict=True):
        if sequence.complete:
            continue
        before = _unedited(lm, cases[row.seed], out / STATE / f"unedited-{row.seed}.json")
        sequence.aside = also.unedited(wanted, lm, About(cases[row.seed], sequence.elsewhere), row.seed, out / STATE)
        if said is None:
            said = lm.generate(plan.transcripts, TRANSCRIPT_TOKENS, stop_at_newline=False)
        for made in sequence.run(method, objective, before, said, snapshot_every):
            done += made
            if progress:
                progress(done, total, row.name)


def _unedited(lm: LanguageModel, cases: Sequence[EditCase], path: Path) -> dict[str, Any]:
    """What the unedited model says about a seed's cases: for all of them at once, once for all rows, however often the run is stopped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(probability.unedited(lm, cases), ensure_ascii=False))
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


@dataclass
class _Sequence:
    """One row of a plan: a method under a seed, from the unedited model to the last checkpoint."""

    plan: Plan
    row: Row
    steps: list[Step]
    lm: LanguageModel
    out: Path
    records: dict[Key, Record]
    wanted: Mapping[str, Measurement]
    elsewhere: Sequence[str]
    aside: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    said: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether every line is there."""
        return all(self.has(step.name) for step in self.steps) and all(self.has(mark_name(mark)) for mark in self.plan.marks)

    @property
    def state(self) -> Path:
        """Where its snapshot lies."""
        return self.out / STATE / f"{quote(self.row.name, safe='@+=')}.{self.row.seed}.pt"

    def has(self, what: str) -> bool:
        return key_of(self.row, what) in self.records

    def run(
        self, method: Method, objective: Objective, before: Mapping[str, Any], said: Sequence[str], snapshot_every: int
    ) -> Iterator[int]:
        """Go on from the last snapshot; yields the number of cases of each step that had no line before.

        Steps that have one are done again where the snapshot is older: with the same seeds, so with the same result.
        """
        self.before, self.said = before, said
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
                    yield self._step(session, trace, step)
                marked = step.edits in self.plan.marks
                if step.edits > begun and (marked or step.edits - kept >= snapshot_every):
                    Snapshot.take(self.lm, step.edits, session.state_dict(), trace.state_dict()).save(self.state)
                    kept = step.edits
                if marked and not self.has(mark_name(step.edits)):
                    self._checkpoint(session, trace, step.edits)
        finally:
            Stack.of(self.lm).clear()
        self.state.unlink(missing_ok=True)

    def _restore(self, session: Session, trace: noise.Trace) -> int:
        """The number of edits from which to go on. A snapshot beyond a line that is missing would leave it missing: begin again."""
        kept = Snapshot.load(self.state)
        if kept is None:
            return 0
        there = [step.name for step in self.steps if step.edits <= kept.edits]
        there += [mark_name(mark) for mark in self.plan.marks if mark < kept.edits]
        if not all(map(self.has, there)):
            return 0
        try:
            session.load_state_dict(kept.session)
        except KeyError as error:
            raise PlanError(f"{self.state} is of another errata (no {error} in it); remove it, and the sequence begins again") from error
        trace.load_state_dict(kept.trace)
        kept.restore(self.lm)
        return kept.edits

    def _step(self, session: Session, trace: noise.Trace, step: Step) -> int:
        """Edit, apply, and write the line where there is none; the number of cases that are new."""
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
        if self.has(step.name):
            return 0
        if self.plan.measure != "after-sequence" and line.get("failure") != FACT:
            line["outcomes"] = self._outcomes(step.cases)
        self._write(line)
        return len(step.cases)

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

    def _checkpoint(self, session: Session, trace: noise.Trace, edits: int) -> None:
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
        self._write(line)

    def _with(self, extra: list[Delta]) -> AbstractContextManager[object]:
        return Edit(self.lm, extra, [], {"name": "finish"}).applied_() if extra else nullcontext()

    def _usable(self, edits: int) -> list[EditCase]:
        """The cases so far, without those whose facts cannot be edited by this method. A case whose edit broke down is asked about too."""
        lines = [(step, self.records[key_of(self.row, step.name)]) for step in self.steps if step.edits <= edits]
        return [case for step, line in lines if line.get("failure") != FACT for case in step.cases]

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

    def _write(self, line: Record) -> None:
        self.records[key_of(self.row, line["step"])] = append(self.out / RECORDS, line)


def _digits(value: float | None) -> float | None:
    """Ten digits: beyond them is the order of summation, and noise comes in any size."""
    return None if value is None else float(f"{value:.10g}")
