"""From requests to a ledger: each is looked at, edited, measured, and kept or taken out again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from errata import methods, objectives
from errata.bench.making import finite, watched
from errata.bench.plan import configure
from errata.corrections.gate import Gate, Limits, Ordinary
from errata.edits import DenseDelta, Edit, EditError, Stack
from errata.edits.ledger import Ledger, New, check_seed, check_unedited, request_of
from errata.edits.rows import Entry, statements
from errata.facts import EditCase, Fact, FactError, check_text, prompt_key
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
AS_MADE: Final = "as made"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. number: the edit in the ledger that answers it, or contradicts it, if there is one. reason: why there is
    no new one, what of it did not take, or in whose place it stands."""

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
    force: also what the model knows already, was turned down before, or was made and is not said; so a forced call that is stopped and made
        again tries again what did not take, and may come to other weights than one that was not.
    replace: an active edit that says otherwise about the same prompt is undone for the new one; without it the request is rejected.
    watch: is shown the session before the first edit.

    What is done is in the ledger at once: stopped or killed, the same call goes on, and comes to the same weights. The model, to which no
    edit may be applied, is left as it was. Raises EditError if the ledger is another model's, ModelError if the method cannot edit it,
    FactError for a note that is no text.
    """
    check_unedited(lm)
    check_text(note or "")
    check_seed(seed)
    if batch < 1:
        raise EditError(f"batch must be at least 1 (got {batch})")
    desk = _Desk(lm, ledger, method, objective, seed, limits, force, note, watch)
    outcomes: list[Outcome] = []
    try:
        desk.take_up()
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
    limits: Limits | Literal["as made"] | None = AS_MADE,
) -> list[Entry]:
    """Undo edits, and compute those anew that were computed on top of them; the new entries. All of it in one step, or nothing.

    numbers: those that are undone already are allowed: then only what was computed on top of them is.
    limits: what an edit that is made again must not break, None: it stays whatever it does; "as made": what held when it was made first.
    Raises EditError where an edit cannot be made any more, or breaks a limit, or the model has edits applied; then nothing was changed.
    """
    check_unedited(lm)
    out = sorted({ledger.entry(number).number for number in numbers})
    again = [ledger.entry(number) for number in ledger.built_on(out, through=True)]
    undone = {entry.number for entry in map(ledger.entry, out) if not entry.active}
    if undone and not again:
        raise EditError(f"edit {min(undone)} of {ledger.folder} is undone already, and no active one was made on top of it")
    gone = {*out, *(entry.number for entry in again)} - undone
    why = f"made again without {', '.join(map(str, out))}"
    sessions: dict[str, Session] = {}
    new: list[New] = []
    stack = Stack.of(lm)
    try:
        applied = [ledger.edit(entry, lm) for entry in ledger.entries(active=True) if entry.number not in gone]
        stack.apply(*applied)
        gates: dict[str, Gate | None] = {}
        for done, entry in enumerate(again):
            key = json.dumps([entry.method, entry.objective, entry.seed], sort_keys=True)
            if key not in sessions:
                sessions[key] = _method(entry).start(lm, _objective(entry), entry.seed)
                sessions[key].resume(applied)
            own = (Limits.from_dict(entry.limits) if entry.limits else None) if limits == AS_MADE else limits
            record = None if own is None else own.to_dict()
            name = json.dumps(record)
            if name not in gates:
                gates[name] = None if own is None else Gate(lm, own)
            gate = gates[name]
            tried = _try(lm, sessions[key], entry.cases, entry.seed, gate, gate.ordinary() if gate else None)
            if tried.edit is None:
                way = " (other limits, or none, would let it pass: --gate, --no-gate)" if tried.metrics else ""
                raise EditError(f"edit {entry.number} cannot be made again: {tried.reason}; nothing was changed{way}")
            for session in sessions.values():  # the one that made it, and those that differ in the seed alone
                session.resume([tried.edit])
            applied.append(tried.edit)
            new.append(New(tried.edit, entry.seed, entry.note, entry.cases, f"edit {entry.number}, {why}", record))
            if progress:
                progress(done + 1, len(again), "made again")
    finally:
        stack.clear()
    return ledger.add(*new, undoing={number: reason if number in out else why for number in sorted(gone)})


@dataclass
class _Tried:
    """An edit that is applied, or None where there is none, and the reason. taken: see `Gate.taken`; ordinary: as the model is now."""

    edit: Edit | None
    reason: str
    metrics: dict[str, Any] | None
    ordinary: Ordinary | None
    taken: Sequence[float]


def _try(lm: LanguageModel, session: Session, cases: Sequence[EditCase], seed: int, gate: Gate | None, ordinary: Ordinary | None) -> _Tried:
    """One edit of all the cases, on top of what is applied; taken out again where it breaks a limit."""
    facts = [fact for case in cases for fact in case.facts]
    made: Edit | None = None
    tried = _Tried(None, "", None, ordinary, [1.0] * len(cases))
    try:
        before = {} if gate is None else gate.measure(cases, ordinary)
        made = watched(lm.device, _seed(seed, facts), lambda: session.propose(facts)).edit
        made.apply()
        finite(lm, made)
        if gate is not None:
            tried.ordinary = gate.ordinary()
            after = gate.measure(cases, tried.ordinary)
            tried.metrics = {"before": _rounded(before), "after": _rounded(after)}
            tried.reason, tried.taken = "; ".join(gate.broken(before, after)), gate.taken(cases)
    except (FactError, EditError, ModelError, FloatingPointError, LinAlgError) as error:
        tried.reason = str(error) or type(error).__name__
    if made is not None and tried.reason:
        if made.applied:
            made.revert()
        tried.ordinary = ordinary
    elif made is not None:
        made.metrics = tried.metrics
        tried.edit = made
    return tried


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
        watch: Callable[[Session], None] | None,
    ) -> None:
        self.watch = watch
        self.lm, self.ledger, self.method, self.objective, self.seed = lm, ledger, method, objective, seed
        self.limits, self.force, self.note = limits, force, note
        self.limits_record = None if limits is None else limits.to_dict()
        self.contradictions = {(*map(str, one.facts), one.reason) for one in ledger.rejections()}
        self.remembered = {one.request: (one.reason, one.event) for one in ledger.rejections()}
        self.gate: Gate | None = None
        self.said: dict[str, dict[int, str]] = {}  # prompt -> edit -> target, of the active ones, with their rephrasings
        self.held: dict[tuple[str, str], int] = {}  # (prompt, target) of their facts alone -> edit
        self.asked_of: dict[int, set[str]] = {}  # edit -> the prompts of its facts
        self.asked: dict[str, str] = {}  # prompt -> target, of this call's requests that were not rejected
        self.changed: dict[str, int] = {}  # prompt -> the last event of an edit that speaks about it
        self.turned = 0  # the last event after which it is another model than one that edits alone would have made
        entries = {entry.number: entry for entry in ledger.entries()}
        for event in ledger.events():
            self.turned = event.number if event.action in ("undone", "redone") else self.turned
            if event.edit in entries:
                self.changed |= dict.fromkeys(statements(entries[event.edit].cases), event.number)
        for entry in entries.values():
            if entry.active:
                self._note(entry)

    def take_up(self, without: Iterable[int] = ()) -> None:
        """Bring model and session to where the ledger stands, but for some of its edits."""
        Stack.of(self.lm).clear()
        left = set(without)
        applied = [self.ledger.edit(entry, self.lm) for entry in self.ledger.entries(active=True) if entry.number not in left]
        Stack.of(self.lm).apply(*applied)
        self.session = self.method.start(self.lm, self.objective, self.seed)
        if self.watch:
            self.watch(self.session)
        self.session.resume(applied)
        self._settle(applied)
        if self.gate is None and self.limits is not None:
            self.gate = Gate(self.lm, self.limits)
        self.ordinary = None if self.gate is None else self.gate.ordinary()

    def handle(self, cases: Sequence[EditCase], replace: bool) -> list[Outcome]:
        """One edit, of those that may be made; what became of each."""
        outcomes: list[Outcome | None] = []
        wanted: dict[int, list[int]] = {}  # place among the cases -> the edits that it takes the place of
        earlier: list[EditCase] = []
        for place, case in enumerate(cases):
            looked = self._look(case, earlier, [*cases[:place], *cases[place + 1 :]], replace)
            outcomes.append(looked if isinstance(looked, Outcome) else None)
            if not isinstance(looked, Outcome):
                wanted[place] = looked
            if not (isinstance(looked, Outcome) and looked.status == REJECTED):
                earlier.append(case)
        if wanted:
            made = self._make({place: cases[place] for place in wanted}, cases, sorted({n for instead in wanted.values() for n in instead}))
            for place, outcome in zip(wanted, made, strict=True):
                outcomes[place] = outcome
        told = [one for one in outcomes if one is not None]
        for one in told:
            if one.status != REJECTED:
                self.asked |= statements([one.case])
        return told

    def _look(self, case: EditCase, earlier: Sequence[EditCase], beside: Sequence[EditCase], replace: bool) -> Outcome | list[int]:
        """What a request comes to without an edit, or the edits that it takes the place of.

        earlier: of its batch those before it that were not rejected; beside: the others of its batch.
        First what this call has asked for, then what the ledger holds, then what it has turned down: so a file that is run again, whole or
        from where it was stopped, comes to the same.
        """
        mine, facts = statements([case]), statements([case], rephrasings=False)
        asked = self.asked | statements(earlier)
        for prompt, target in [*mine.items(), *((prompt_key(fact.text), fact.target.strip()) for fact in case.facts)]:
            if (said := asked.get(prompt, mine[prompt])) != target:
                return self._contradicted(case, f"another request says {said!r} about the same; ask for one of them")
        held = [self.held.get(statement, 0) for statement in facts.items()]
        if all(held) and ((says := self._says(case)) or not self.force):
            number = max(held)
            doubt = f"edit {number} was made for it, and the model does not say it now; force it to try again"
            return Outcome(case, SKIPPED, f"edit {number} says so already" if says else doubt, number)
        if not self.force and (reason := self._turned_down(case, beside)) is not None:
            if reason == KNOWN and not self._says(case):
                reason = f"{KNOWN}; it does not any more"
            return Outcome(case, SKIPPED if reason.startswith(KNOWN) else REJECTED, f"before: {reason}; force it to try again")
        if facts.items() <= statements(earlier, rephrasings=False).items():
            return Outcome(case, SKIPPED, "another request says so already")
        instead = {n: said for prompt, target in mine.items() for n, said in self.said.get(prompt, {}).items() if said != target}
        if instead and not replace:
            number = max(instead)
            return self._contradicted(case, f"edit {number} says {instead[number]!r} about the same; undo it, or replace it", number)
        instead |= {number: "" for number in held if number}  # forced: once more, in the place of the one that holds it
        for number in instead:
            if more := self.asked_of[number] - mine.keys():
                reason = f"edit {number} answers {len(more)} more request{'s' if len(more) > 1 else ''}, which would be lost with it"
                return self._contradicted(case, f"{reason}; undo it, and ask for what shall stay", number)
        try:
            for fact in case.facts:
                if fact.subject:
                    _ = fact.subject_span  # raises where it does not occur
            known = not self.force and self._says(case)
        except (FactError, ModelError) as error:
            self._remember_no(case, beside, str(error))
            return Outcome(case, REJECTED, str(error))
        if known and not instead:
            self._remember_no(case, beside, KNOWN)
            return Outcome(case, SKIPPED, KNOWN)
        return sorted(instead)

    def _make(self, wanted: Mapping[int, EditCase], batch: Sequence[EditCase], instead: Sequence[int]) -> list[Outcome]:
        """One edit of all of them, or none, and why."""
        cases = list(wanted.values())
        if instead:
            try:
                self.take_up(without=instead)
            except EditError as error:  # a memory that later ones hold on to
                self.take_up()
                return [self._contradicted(case, str(error)) for case in cases]
        tried = _try(self.lm, self.session, cases, self.seed, self.gate, self.ordinary)
        if tried.edit is None:
            for place, case in wanted.items():
                self._remember_no(case, [*batch[:place], *batch[place + 1 :]], tried.reason, tried.metrics)
            if instead:
                self.take_up()
            return [Outcome(case, REJECTED, tried.reason) for case in cases]
        new = New(tried.edit, self.seed, self.note, cases, limits=self.limits_record)
        try:
            (entry,) = self.ledger.add(new, undoing=dict.fromkeys(instead, "replaced"), replacing=True)
        except EditError as error:  # one that grew from a memory that others hold on to
            self.take_up()
            return [self._contradicted(case, str(error)) for case in cases]
        self.session.remember(tried.edit)
        self._settle([tried.edit])
        self.ordinary = tried.ordinary
        for there in self.said.values():
            for number in instead:
                there.pop(number, None)
        self.held = {statement: number for statement, number in self.held.items() if number not in instead}
        self._note(entry)
        placed = f"in the place of edit {', '.join(map(str, instead))}" if instead else None
        missed = [placed if share >= 1 else f"only {share:.0%} of its tokens are said by edit {entry.number}" for share in tried.taken]
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

    def _says(self, case: EditCase) -> bool:
        """Whether the model as it is puts every token of the answers behind their prompts."""
        return all(one.accuracy == 1 for one in predict(self.lm, [(fact.text, fact.target) for fact in case.facts]))

    def _turned_down(self, case: EditCase, beside: Sequence[EditCase]) -> str | None:
        """Why the same request came to nothing before, if that still holds: what the model knew, it knows no more once it was edited."""
        reason, event = self.remembered.get(self._request(case, beside), (None, 0))
        edited = max(self.changed.get(prompt, 0) for prompt in statements([case]))
        return None if event < self.turned or (reason == KNOWN and edited > event) else reason

    def _remember_no(self, case: EditCase, beside: Sequence[EditCase], reason: str, metrics: Mapping[str, Any] | None = None) -> None:
        request = self._request(case, beside)
        self.ledger.reject(request, case.facts, reason, metrics)
        self.remembered[request] = reason, sys.maxsize  # as long as this call lasts

    def _request(self, case: EditCase, beside: Sequence[EditCase]) -> str:
        method = json.loads(json.dumps(self.session.method.to_dict()))
        return request_of(case, method, self.session.record(), self.seed, self.limits_record, beside)

    def _note(self, entry: Entry) -> None:
        for prompt, target in statements(entry.cases).items():
            self.said.setdefault(prompt, {})[entry.number] = target
        own = statements(entry.cases, rephrasings=False)
        self.held |= dict.fromkeys(own.items(), entry.number)
        self.asked_of[entry.number] = {*own}


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
