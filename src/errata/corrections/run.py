"""From requests to a ledger: each is looked at, edited, measured, and kept or taken out again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from errata import methods, objectives
from errata.bench.making import finite, watched
from errata.bench.plan import configure
from errata.corrections.gate import Gate, Limits
from errata.edits import DenseDelta, Edit, EditError, Stack
from errata.edits.ledger import Entry, Ledger, New, request_of
from errata.facts import EditCase, Fact, FactError
from errata.lm import ModelError
from errata.metrics.teacher_forced import predict

if TYPE_CHECKING:
    from errata.lm import LanguageModel
    from errata.methods import Method, Session
    from errata.objectives import Objective

T = TypeVar("T")

MADE: Final = "made"
SKIPPED: Final = "skipped"
REJECTED: Final = "rejected"
KNOWN = "the model says so already"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. number: the edit in the ledger that answers it, if one does. reason: why there is no new one."""

    case: EditCase
    status: Literal["made", "skipped", "rejected"]
    reason: str | None = None
    number: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = [str(fact) for fact in self.case.facts]
        return {"facts": facts, "status": self.status, "number": self.number, "reason": self.reason}


def correct(
    lm: LanguageModel,
    ledger: Ledger,
    cases: Sequence[EditCase],
    method: Method,
    objective: Objective | None = None,
    seed: int = 0,
    batch: int = 1,
    limits: Limits | None = None,
    force: bool = False,
    replace: bool = False,
    note: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    watch: Callable[[Session], None] | None = None,
) -> list[Outcome]:
    """Edit what the cases ask for, on top of what the ledger holds, and enter it; one outcome a case, in their order.

    batch: so many cases become one edit. limits: what an edit must not break, None: it stays whatever it does.
    force: also what the model knows already, or was turned down before. replace: an active edit that says otherwise about the same prompt
        is undone for the new one; without it the request is rejected.
    watch: is shown the session before the first edit.

    What is done is in the ledger at once: stopped or killed, the same call goes on, and comes to the same weights. The model, to which no
    edit may be applied, is left as it was. Raises EditError if the ledger is another model's, ModelError if the method cannot edit it.
    """
    desk = _Desk(lm, ledger, method, objective, seed, limits, force, note)
    outcomes: list[Outcome] = []
    try:
        desk.take_up(watch)
        for start in range(0, len(cases), batch):
            outcomes += desk.handle(cases[start : start + batch], replace)
            if progress:
                progress(len(outcomes), len(cases), f"{sum(one.status == REJECTED for one in outcomes)} rejected")
    finally:
        Stack.of(lm).clear()
    return outcomes


def rebase(
    lm: LanguageModel,
    ledger: Ledger,
    numbers: Iterable[int],
    reason: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Entry]:
    """Undo edits, and compute those anew that were computed on top of them; the new entries. All of it in one step, or nothing.

    Raises EditError, FactError or FloatingPointError where an edit cannot be made any more; then nothing was changed.
    """
    out = sorted(set(numbers))
    if undone := [entry.number for entry in map(ledger.entry, out) if not entry.active]:
        raise EditError(f"edit {undone[0]} of {ledger.folder} is undone already; nothing was changed")
    again = [ledger.entry(number) for number in ledger.built_on(out)]
    gone = {*out, *(entry.number for entry in again)}
    sessions: dict[str, Session] = {}
    new: list[New] = []
    stack = Stack.of(lm)
    try:
        applied = [ledger.edit(entry, lm, keys=True) for entry in ledger.entries(active=True) if entry.number not in gone]
        stack.apply(*applied)
        for done, entry in enumerate(again):
            key = json.dumps([entry.method, entry.objective, entry.seed], sort_keys=True)
            if key not in sessions:
                sessions[key] = _method(entry).start(lm, _objective(entry), entry.seed)
                sessions[key].resume(applied)
            session, facts = sessions[key], list(entry.facts)
            made = watched(lm.device, _seed(entry.seed, facts), lambda session=session, facts=facts: session.propose(facts)).edit  # type: ignore[misc]
            made.apply()
            finite(lm, made)
            session.remember(made)
            applied.append(made)
            new.append(New(made, entry.seed, f"edit {entry.number}, made again without {', '.join(map(str, out))}"))
            if progress:
                progress(done + 1, len(again), "made again")
    finally:
        stack.clear()
    return ledger.add(*new, undoing=sorted(gone), reason=reason)


class _Desk:
    """The model as the ledger has it, and the session that goes on from there."""

    def __init__(
        self,
        lm: LanguageModel,
        ledger: Ledger,
        method: Method,
        objective: Objective | None,
        seed: int,
        limits: Limits | None,
        force: bool,
        note: str | None,
    ) -> None:
        self.lm, self.ledger, self.method, self.objective, self.seed = lm, ledger, method, objective, seed
        self.limits, self.force, self.note = limits, force, note
        other = max((event.number for event in ledger.events() if event.action in ("undone", "redone")), default=0)
        self.contradictions = {(*map(str, one.facts), one.reason) for one in ledger.rejections()}
        self.turned_down = {one.request: one.reason for one in ledger.rejections() if one.event >= other}  # since then it is another model
        self.gate: Gate | None = None
        self.said: dict[str, tuple[int, str]] = {}  # prompt -> (edit, target) of the active ones
        for entry in ledger.entries(active=True):
            self._note(entry)

    def take_up(self, watch: Callable[[Session], None] | None = None, without: Iterable[int] = ()) -> None:
        """Bring model and session to where the ledger stands, but for some of its edits."""
        Stack.of(self.lm).clear()
        left = set(without)
        applied = [self.ledger.edit(entry, self.lm, keys=True) for entry in self.ledger.entries(active=True) if entry.number not in left]
        Stack.of(self.lm).apply(*applied)
        self.session = self.method.start(self.lm, self.objective, self.seed)
        if watch:
            watch(self.session)
        self.session.resume(applied)
        self._settle(applied)
        if self.gate is None and self.limits is not None:
            self.gate = Gate(self.lm, self.limits)
        self.ordinary = None if self.gate is None else self.gate.ordinary()

    def handle(self, cases: Sequence[EditCase], replace: bool) -> list[Outcome]:
        """One edit, of those that may be made; what became of each."""
        outcomes: list[Outcome | None] = []
        wanted: dict[int, list[int]] = {}  # place among the cases -> the edits that it takes the place of
        asked: dict[str, str] = {}
        for place, case in enumerate(cases):
            looked = self._look(case, replace, asked)
            outcomes.append(looked if isinstance(looked, Outcome) else None)
            if not isinstance(looked, Outcome):
                wanted[place] = looked
                asked |= {_key(fact.text): fact.target.strip() for fact in case.facts}
        if wanted:
            made = self._try([cases[place] for place in wanted], sorted({number for instead in wanted.values() for number in instead}))
            for place, outcome in zip(wanted, made, strict=True):
                outcomes[place] = outcome
        return [one for one in outcomes if one is not None]

    def _look(self, case: EditCase, replace: bool, asked: Mapping[str, str]) -> Outcome | list[int]:
        """What a request comes to without an edit, or the edits that it takes the place of. asked: what its batch says, by prompt."""
        instead = []
        earlier = None if self.force else self.turned_down.get(self._request(case.facts))
        if earlier is not None:
            return Outcome(case, SKIPPED if earlier == KNOWN else REJECTED, f"before: {earlier}; force it to try again")
        for fact in case.facts:
            if (beside := asked.get(_key(fact.text))) is not None:
                if beside == fact.target.strip():
                    return Outcome(case, SKIPPED, "another request of its batch says so already")
                return self._contradicted(case, f"another request of its batch says {beside!r} about the same; ask for one of them")
            if not (there := self.said.get(_key(fact.text))):
                continue
            number, target = there
            if target == fact.target.strip():
                return Outcome(case, SKIPPED, f"edit {number} says so already", number)
            if not replace:
                return self._contradicted(case, f"edit {number} says {target!r} about the same; undo it, or replace it", number)
            instead.append(number)
        try:
            for fact in case.facts:
                if fact.subject:
                    _ = fact.subject_span  # raises where it does not occur
            known = not self.force and all(one.accuracy == 1 for one in predict(self.lm, [(f.text, f.target) for f in case.facts]))
        except (FactError, ModelError) as error:
            self._remember_no([case], str(error))
            return Outcome(case, REJECTED, str(error))
        if known and not instead:
            self._remember_no([case], KNOWN)
            return Outcome(case, SKIPPED, KNOWN)
        return instead

    def _try(self, cases: Sequence[EditCase], instead: Sequence[int]) -> list[Outcome]:
        """One edit of all of them, or none, and why."""
        facts = [fact for case in cases for fact in case.facts]
        if instead:
            self.take_up(without=instead)
        metrics: dict[str, Any] | None = None
        made: Edit | None = None
        ordinary, taken = self.ordinary, [1.0] * len(cases)
        try:
            before = {} if self.gate is None else self.gate.measure(cases, ordinary)
            made = watched(self.lm.device, _seed(self.seed, facts), lambda: self.session.propose(facts)).edit
            made.apply()
            finite(self.lm, made)
            reason = ""
            if self.gate is not None:
                ordinary = self.gate.ordinary()
                after = self.gate.measure(cases, ordinary)
                metrics = {"before": _rounded(before), "after": _rounded(after)}
                reason, taken = "; ".join(self.gate.broken(before, after)), self.gate.taken(cases)
        except (FactError, EditError, ModelError, FloatingPointError, LinAlgError) as error:
            reason = str(error)
        if made is None or reason:
            if made is not None and made.applied:
                made.revert()
            self._remember_no(cases, reason, metrics)
            if instead:
                self.take_up()
            return [Outcome(case, REJECTED, reason) for case in cases]
        made.metrics = metrics
        (entry,) = self.ledger.add(New(made, self.seed, self.note), undoing=instead, reason="replaced" if instead else None, replacing=True)
        self.session.remember(made)
        self._settle([made])
        self.ordinary = ordinary
        self.said = {prompt: there for prompt, there in self.said.items() if there[0] not in instead}
        self._note(entry)
        missed = [None if share >= 1 else f"only {share:.0%} of its tokens are said by edit {entry.number}" for share in taken]
        return [Outcome(case, MADE, why, entry.number) for case, why in zip(cases, missed, strict=True)]

    def _settle(self, made: Sequence[Edit]) -> None:
        """Those with whole matrices, or a memory, are folded: one an edit would soon outweigh the model."""
        if any(edit.memory is not None or any(isinstance(delta, DenseDelta) for delta in edit.deltas) for edit in made):
            Stack.of(self.lm).fold()

    def _contradicted(self, case: EditCase, reason: str, number: int | None = None) -> Outcome:
        """Rejected for as long as the other one stands: recorded once, and looked at anew each time."""
        if (told := (*map(str, case.facts), reason)) not in self.contradictions:
            self.ledger.reject("", case.facts, reason)
            self.contradictions.add(told)
        return Outcome(case, REJECTED, reason, number)

    def _remember_no(self, cases: Sequence[EditCase], reason: str, metrics: Mapping[str, Any] | None = None) -> None:
        for case in cases:
            self.ledger.reject(self._request(case.facts), case.facts, reason, metrics)
            self.turned_down[self._request(case.facts)] = reason

    def _request(self, facts: Sequence[Fact]) -> str:
        return request_of(facts, json.loads(json.dumps(self.session.method.to_dict())), self.session.record(), self.seed)

    def _note(self, entry: Entry) -> None:
        self.said |= {_key(fact.text): (entry.number, fact.target.strip()) for fact in entry.facts}


def _key(prompt: str) -> str:
    """The same for prompts that differ in case and white space alone."""
    return " ".join(prompt.casefold().split())


def _seed(seed: int, facts: Sequence[Fact]) -> int:
    """From the seed and what is edited: whatever was edited before, an edit draws the same numbers."""
    text = json.dumps([seed, [str(fact) for fact in facts]], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _method(entry: Entry) -> Method:
    """The method of an entry, every setting as it was."""
    return _configured(methods.get(str(entry.method["name"])), entry.method)


def _objective(entry: Entry) -> Objective | None:
    if entry.objective is None:
        return None
    return _configured(objectives.get(str(entry.objective["name"])), entry.objective)


def _configured(part: T, record: Mapping[str, Any]) -> T:
    own = json.loads(json.dumps(asdict(part)))  # type: ignore[call-overload]  # methods and objectives are dataclasses
    return configure(
        part, {name: value for name, value in record.items() if name != "name" and own.get(name) != value}, str(record["name"])
    )


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in metrics.items()}
