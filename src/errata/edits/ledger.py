"""The ledger: every correction of one model as a durable row, its tensors beside it. Edits can be listed, undone in any order, redone.

A folder with an SQLite database and content-addressed tensors (`errata.edits.objects`). The weights that it stands for are those of the
base model with the active edits applied in the order of their numbers, so they depend on which edits are active and on nothing else.

What a call has returned is on the disk; a crash at any point leaves the ledger as it was before the call, or after it. Tensors are written
first and named by a row afterwards, so a row never names what is not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from filelock import FileLock, Timeout

from errata.disk import folders
from errata.edits.errors import EditError
from errata.edits.objects import Objects
from errata.facts import Fact

if TYPE_CHECKING:
    from errata.edits.edit import Edit, Layout
    from errata.lm.model import LanguageModel

DATABASE, LOCK, OBJECTS = "ledger.sqlite", "ledger.lock", "objects"

SCHEMA = (
    """
    CREATE TABLE base (name TEXT NOT NULL, fingerprint TEXT NOT NULL, dtype TEXT NOT NULL);
    CREATE TABLE edits (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, made TEXT NOT NULL, facts TEXT NOT NULL, method TEXT NOT NULL,
        objective TEXT NOT NULL, seed INTEGER NOT NULL, parent INTEGER, layout TEXT NOT NULL, tensors TEXT, memory TEXT,
        diagnostics TEXT NOT NULL, metrics TEXT, note TEXT, active INTEGER NOT NULL, checksum TEXT NOT NULL
    );
    CREATE TABLE events (number INTEGER PRIMARY KEY, at TEXT NOT NULL, action TEXT NOT NULL, edit INTEGER NOT NULL, reason TEXT);
    CREATE TABLE rejections (
        number INTEGER PRIMARY KEY, at TEXT NOT NULL, request TEXT NOT NULL, facts TEXT NOT NULL, reason TEXT NOT NULL, metrics TEXT,
        event INTEGER NOT NULL
    )
    """,
)
"""What brings a database from version n to n + 1, for n from 0 on. A newer errata appends to it, and older ledgers are brought up when they
are next written to."""

_FIELDS = (
    "number", "id", "made", "facts", "method", "objective", "seed", "parent", "layout", "tensors", "memory", "diagnostics", "metrics",
    "note", "active",
)  # fmt: skip
_Row = tuple[Any, ...]
OUT = ("undone", "replaced")
"""The actions after which an edit is not active."""


class Base(NamedTuple):
    """The model that a ledger is about."""

    name: str
    fingerprint: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One edit in the ledger.

    number: its place in the order. id: names what it is (base, facts, method, objective, seed, tensors); made again, it is the same.
    made: when, UTC. parent: the last edit that was active when it was made. note: who asked for it, or why.
    metrics: what was measured before and after, if anything. layout, tensors, memory: what `Ledger.edit` reads.
    """

    number: int
    id: str
    made: str
    facts: tuple[Fact, ...]
    method: Mapping[str, Any]
    objective: Mapping[str, Any] | None
    seed: int
    parent: int | None
    layout: Layout
    tensors: str | None
    memory: Mapping[str, Any] | None
    diagnostics: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    note: str | None
    active: bool

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = {"number": self.number, "id": self.id, "made": self.made, "active": self.active, "parent": self.parent, "note": self.note}
        told |= {"facts": [fact.to_dict() for fact in self.facts], "method": self.method, "objective": self.objective, "seed": self.seed}
        told |= {"matrices": [part["path"] for part in self.layout["deltas"]], "memory": self.memory and self.memory["kind"]}
        return told | {"diagnostics": self.diagnostics, "metrics": self.metrics}


class New(NamedTuple):
    """An edit that is to be entered."""

    edit: Edit
    seed: int = 0
    note: str | None = None


class Event(NamedTuple):
    """What happened to an edit: "made", "undone", "redone", or "replaced" by a new one."""

    number: int
    at: str
    action: str
    edit: int
    reason: str | None


class Rejection(NamedTuple):
    """A request that came to nothing, and why.

    request: see `request_of`; empty if it may be asked for again. event: number of the last one before it, 0 if there was none.
    """

    number: int
    at: str
    request: str
    facts: tuple[Fact, ...]
    reason: str
    metrics: Mapping[str, Any] | None
    event: int


class Ledger:
    """`with Ledger.open(folder) as ledger:` to read, `with Ledger.write(folder, lm) as ledger:` to change, one process at a time."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: FileLock | None) -> None:
        self.folder = folder
        self.objects = Objects(folder / OBJECTS)
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """To read. Raises EditError if there is no ledger, or one of a newer errata."""
        folder = Path(folder)
        if not is_ledger(folder):
            raise EditError(f"{folder} holds no ledger; give the folder that 'errata edit --out' wrote")
        path = folder / DATABASE
        # Where nothing may be written, SQLite cannot share the file with a writer; there is none, so it need not.
        mode = "mode=ro" if os.access(folder, os.W_OK) else "mode=ro&immutable=1"
        with _sql(path):
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
        ledger = cls(folder, connection, None)
        try:
            if ledger._version() == 0:
                raise EditError(f"{folder} holds a ledger that was never begun; make an edit: errata edit … --out {folder}")
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def write(cls, folder: str | Path, lm: LanguageModel | None = None) -> Self:
        """To change; with `lm`, a new one of that model if there is none.

        Raises EditError if another process is writing, the folder is something else, the ledger is another model's or a newer errata's.
        """
        folder = Path(folder)
        if not is_ledger(folder):
            if lm is None:
                raise EditError(f"{folder} holds no ledger; give the folder that 'errata edit --out' wrote")
            if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
                raise EditError(f"{folder} exists already and is no ledger; give another place")
            folders(folder)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise EditError(f"another process is writing to the ledger {folder}; wait until it is done, or stop it") from None
        path = folder / DATABASE
        try:
            with _sql(path):
                ledger = cls(folder, sqlite3.connect(path, isolation_level=None), lock)
        except BaseException:
            lock.release()
            raise
        try:
            with _sql(path):
                ledger._connection.execute("PRAGMA journal_mode = WAL")
                ledger._connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            ledger._migrate(lm)
            if lm is not None:
                ledger.check_base(lm)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the files, and let others write."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def base(self) -> Base:
        """The model that it is about."""
        rows = self._all("SELECT name, fingerprint, dtype FROM base")
        if len(rows) != 1 or not all(isinstance(text, str) for text in rows[0]):
            raise EditError(f"{self.folder / DATABASE} does not name its model any more; put the ledger back from a backup")
        return Base(*rows[0])

    @property
    def checksum(self) -> str:
        """SHA-256 that names the weights it stands for: base and active edits, in their order."""
        return _digest([self.base.fingerprint, *(row[0] for row in self._all("SELECT id FROM edits WHERE active ORDER BY number"))])

    def check_base(self, lm: LanguageModel) -> None:
        """Raise EditError if it is another model's."""
        if (base := self.base).fingerprint != lm.fingerprint:
            raise EditError(
                f"the ledger {self.folder} is about the model {base.name!r} ({base.dtype}, {base.fingerprint[:12]}), this is {lm.name!r} "
                f"({_short(lm)}, {lm.fingerprint[:12]}); load that model in that dtype, without edits in its weights"
            )

    # What is there

    def entries(self, active: bool | None = None) -> list[Entry]:
        """All edits, or only the active or undone ones, in their order. Raises EditError for a row that is damaged."""
        where = "" if active is None else f" WHERE active = {int(active)}"
        return [_entry(row, self.folder) for row in self._all(f"{_SELECT}{where} ORDER BY number")]

    def entry(self, ref: int | str) -> Entry:
        """The edit of that number, or whose id begins so, by four characters or more. Raises EditError if there is none, or several."""
        text = str(ref).removeprefix("#")
        rows = self._all(f"{_SELECT} WHERE number = ?", int(text)) if text.isdecimal() else []
        if not rows and len(text) >= 4:
            rows = self._all(f"{_SELECT} WHERE substr(id, 1, ?) = ?", len(text), text)
        if len(rows) != 1:
            (count,) = self._all("SELECT count(*) FROM edits")[0]
            many = f"{len(rows)} edits of {self.folder} begin" if rows else f"no edit of {self.folder} has the number or begins"
            raise EditError(f"{many} with {text!r}; there are {count}, numbered from 1: see errata log {self.folder}")
        return _entry(rows[0], self.folder)

    def events(self) -> list[Event]:
        """What happened, in its order."""
        return [Event(*row) for row in self._all("SELECT number, at, action, edit, reason FROM events ORDER BY number")]

    def rejections(self) -> list[Rejection]:
        """What came to nothing, in its order."""
        rows = self._all("SELECT number, at, request, facts, reason, metrics, event FROM rejections ORDER BY number")
        return [Rejection(n, at, request, _facts(facts), why, _read(metrics), event) for n, at, request, facts, why, metrics, event in rows]

    def built_on(self, numbers: Iterable[int]) -> list[int]:
        """The active edits, others than these, that were made while one of them was in the model: they would be others without it."""
        asked, there, found = set(numbers), set[int](), set[int]()
        for event in self.events():
            if event.action == "made" and asked & there:
                found.add(event.edit)
            (there.discard if event.action in OUT else there.add)(event.edit)
        return sorted((found & there) - asked)

    def edit(self, entry: Entry, lm: LanguageModel, keys: bool = False) -> Edit:
        """The edit itself, of the model of this ledger. keys: also those that it was solved with, which only a session needs that goes on.

        Raises EditError if its tensors are missing or damaged, or the model is another.
        """
        from errata.edits.edit import Edit, assembled  # torch: not for listing and undoing
        from errata.edits.memory import load_memory

        self.check_base(lm)
        tensors = {} if entry.tensors is None else self.objects.get(entry.tensors)
        try:
            deltas, solved = assembled(entry.layout, tensors, keys)
            memory = None
            if entry.memory is not None:
                parts = {name: self.objects.get(place)["tensor"] for name, place in entry.memory["tensors"].items()}
                memory = load_memory({**entry.memory, "tensors": parts})
        except (KeyError, TypeError) as error:
            raise EditError(f"the tensors of edit {entry.number} of {self.folder} are not those that its row names ({error})") from error
        return Edit(lm, deltas, entry.facts, entry.method, entry.objective, entry.diagnostics, solved, memory, entry.metrics)

    def edits(self, lm: LanguageModel, keys: bool = False) -> list[Edit]:
        """The active ones in their order; see `edit`."""
        return [self.edit(entry, lm, keys) for entry in self.entries(active=True)]

    def apply(self, lm: LanguageModel, keys: bool = False) -> list[Edit]:
        """Bring the model, to which nothing is applied, to where the ledger stands; the edits that are applied then. All of them, or none.

        keys: as in `edit`.

        Raises EditError if edits are applied already.
        """
        from errata.edits.stack import Stack

        stack = Stack.of(lm)
        if stack.active:
            raise EditError(f"{lm.name} has edits applied; revert them first: a ledger is about the unedited model")
        edits = self.edits(lm, keys)
        stack.apply(*edits)
        return edits

    # What can be done

    def add(self, *new: New, undoing: Iterable[int] = (), reason: str | None = None, replacing: bool = False) -> list[Entry]:
        """Enter edits, and undo others, in one step; the new entries. replacing: as what happened these are "replaced", not "undone".

        Raises EditError for an edit of another model, or a memory that does not go on from those of the active edits.
        """
        for one in new:
            if one.edit.lm_fingerprint != self.base.fingerprint:
                raise EditError(f"{one.edit} was made for another model than the ledger {self.folder} is about ({self.base.name!r})")
        with self._sweeping(), self._transaction():
            kept = [self._kept(one.edit) for one in new]  # before any row names them
            self._set(list(undoing), "replaced" if replacing else "undone", reason)
            (number,) = self._all("SELECT coalesce(max(number), 0) FROM edits")[0]
            numbers = list(range(number + 1, number + 1 + len(new)))
            for number, one, (layout, tensors, memory) in zip(numbers, new, kept, strict=True):
                (parent,) = self._all("SELECT max(number) FROM edits WHERE active")[0]
                edit, facts = one.edit, [fact.to_dict() for fact in one.edit.facts]
                named = [self.base.fingerprint, facts, edit.method, edit.objective, one.seed, layout, tensors, memory]
                row = (
                    number, _digest(named)[:12], _now(), _json(facts), _json(edit.method), _json(edit.objective), one.seed, parent,
                    _json(layout), tensors, memory and _json(memory), _json(edit.diagnostics), edit.metrics and _json(edit.metrics),
                    one.note, 1,
                )  # fmt: skip
                marks = ", ".join("?" * (len(_FIELDS) + 1))
                self._all(f"INSERT INTO edits ({', '.join(_FIELDS)}, checksum) VALUES ({marks})", *row, _checksum(row))
                self._happened("made", number, None)
            self._check_memories()
        return [self.entry(number) for number in numbers]

    def undo(self, *numbers: int, reason: str | None = None) -> None:
        """Take edits out, in one step: they stay in the ledger, and not in the weights. Raises EditError if one is undone already, or a
        later one holds what it keeps beside the weights."""
        with self._transaction():
            self._set(numbers, "undone", reason)
            self._check_memories()

    def redo(self, *numbers: int, reason: str | None = None) -> None:
        """Put edits back into their places in the order, in one step. Raises EditError if one is active already."""
        with self._transaction():
            self._set(numbers, "redone", reason)
            self._check_memories()

    def reject(self, request: str, facts: Sequence[Fact], reason: str, metrics: Mapping[str, Any] | None = None) -> None:
        """Record what came to nothing, and why."""
        row = (_now(), request, _json([fact.to_dict() for fact in facts]), reason, metrics and _json(metrics))
        last = "(SELECT coalesce(max(number), 0) FROM events)"
        with self._transaction():
            self._all(f"INSERT INTO rejections (at, request, facts, reason, metrics, event) VALUES (?, ?, ?, ?, ?, {last})", *row)

    def verify(self, lm: LanguageModel | None = None) -> list[str]:
        """What is wrong with it, one line each: a damaged database or row, tensors that are missing or not what they were, states that do
        not follow from what happened, another base model. Empty if all is well."""
        problems: list[str] = []
        try:
            problems += [f"{self.folder / DATABASE}: {row[0]}" for row in self._all("PRAGMA integrity_check") if row[0] != "ok"]
            rows = self._all(f"{_SELECT} ORDER BY number")
            happened = {event.edit: event.action for event in self.events()}
            known = lm is not None and self.base.fingerprint == lm.fingerprint
        except EditError as error:
            return [*problems, str(error)]
        for row in rows:
            try:
                entry = _entry(row, self.folder)
            except EditError as error:
                problems.append(str(error))
                continue
            if (happened.get(entry.number, OUT[0]) not in OUT) != entry.active:
                problems.append(f"edit {entry.number} is {'active' if entry.active else 'undone'}, which is not what happened to it last")
            if lm is not None and known:
                problems += _told(lambda entry=entry: self.edit(entry, lm, keys=True), f"edit {entry.number}")
            else:
                for name in _objects(entry):
                    problems += _told(lambda name=name: self.objects.get(name), f"edit {entry.number}")
        problems += _told(self._check_memories, "memories")
        problems += _told(lambda: self.check_base(lm), "base") if lm is not None else []
        return problems

    # How

    def _kept(self, edit: Edit) -> tuple[Layout, str | None, dict[str, Any] | None]:
        """Its tensors, put away: layout and name of those of deltas and keys, and its memory with names in the place of tensors."""
        layout, tensors = edit.parts()
        memory = None if edit.memory is None else edit.memory.state()
        if memory is not None:  # each by itself: what an edit has in common with the one before is there already
            memory["tensors"] = {name: self.objects.put({"tensor": tensor}) for name, tensor in memory["tensors"].items()}
        try:
            _json([edit.method, edit.objective, edit.diagnostics, memory])
        except (TypeError, ValueError) as error:
            raise EditError(f"{edit} cannot be kept: method, objective and diagnostics must be plain JSON values ({error})") from error
        return layout, self.objects.put(tensors) if tensors else None, memory

    def _set(self, numbers: Sequence[int], action: str, reason: str | None) -> None:
        active = action not in OUT
        for entry in [self.entry(number) for number in dict.fromkeys(numbers)]:
            if entry.active == active:
                raise EditError(f"edit {entry.number} of {self.folder} is {'active' if active else 'undone'} already; nothing was changed")
            ((*row, _),) = self._all(f"{_SELECT} WHERE number = ?", entry.number)
            row[-1] = int(active)
            self._all("UPDATE edits SET active = ?, checksum = ? WHERE number = ?", int(active), _checksum(row), entry.number)
            self._happened(action, entry.number, reason)

    def _happened(self, action: str, number: int, reason: str | None) -> None:
        self._all("INSERT INTO events (at, action, edit, reason) VALUES (?, ?, ?, ?)", _now(), action, number, reason)

    def _check_memories(self) -> None:
        """A memory holds those of all earlier edits of its session, so each must go on from the one before."""
        before: str | None = None
        for number, text in self._all("SELECT number, memory FROM edits WHERE active AND memory IS NOT NULL ORDER BY number"):
            memory = json.loads(text)
            if memory["parent"] != before:
                raise EditError(
                    f"edit {number} keeps a memory beside the weights that holds those of earlier edits, and would not stand behind these: "
                    "undo such edits from the last one back, redo them from the first one on, or undo with rebase; nothing was changed"
                )
            before = memory["id"]

    def _migrate(self, lm: LanguageModel | None) -> None:
        version = self._version()
        if version == 0 and lm is None:
            raise EditError(f"{self.folder} holds a ledger that was never begun; make an edit: errata edit … --out {self.folder}")
        if version < len(SCHEMA):
            with self._transaction():
                for script in SCHEMA[version:]:
                    for statement in script.split(";"):
                        self._all(statement)
                if lm is not None and version == 0:
                    self._all("INSERT INTO base VALUES (?, ?, ?)", lm.name, lm.fingerprint, _short(lm))
                self._all(f"PRAGMA user_version = {len(SCHEMA)}")
        self._sweep()

    def _version(self) -> int:
        ((version,),) = self._all("PRAGMA user_version")
        if version > len(SCHEMA):
            raise EditError(f"{self.folder} has schema {version}, this errata reads up to {len(SCHEMA)}; install a newer errata")
        return int(version)

    def _sweep(self) -> None:
        self.objects.sweep({name for entry in self.entries() for name in _objects(entry)})

    @contextmanager
    def _sweeping(self) -> Iterator[None]:
        """What an edit that fails has left of its tensors is removed."""
        try:
            yield
        except BaseException:
            if self._lock is not None:  # else another process may be writing them
                with suppress(EditError, OSError):
                    self._sweep()
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._lock is None:
            raise EditError(f"the ledger {self.folder} was opened to be read; open it with Ledger.write")
        self._all("BEGIN IMMEDIATE")
        try:
            yield
            self._all("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _all(self, statement: str, *values: Any) -> list[_Row]:
        with _sql(self.folder / DATABASE):
            return self._connection.execute(statement, values).fetchall()


def is_ledger(folder: Path) -> bool:
    """Whether the folder holds a ledger."""
    return (folder / DATABASE).is_file()


def request_of(facts: Sequence[Fact], method: Mapping[str, Any], objective: Mapping[str, Any] | None, seed: int) -> str:
    """Names a request: the same facts asked for in the same way."""
    return _digest([[fact.to_dict() for fact in facts], method, objective, seed])


_SELECT = f"SELECT {', '.join(_FIELDS)}, checksum FROM edits"


def _entry(row: Sequence[Any], folder: Path) -> Entry:
    *values, checksum = row
    if _checksum(values) != checksum:
        raise EditError(f"the row of edit {values[0]} in {folder / DATABASE} is damaged; put the ledger back from a backup")
    field = dict(zip(_FIELDS, values, strict=True))
    read = {name: _read(field[name]) for name in ("method", "objective", "layout", "memory", "diagnostics", "metrics")}
    return Entry(**{**field, **read, "facts": _facts(field["facts"]), "active": bool(field["active"])})


def _objects(entry: Entry) -> list[str]:
    """The names of its tensors."""
    own = [] if entry.tensors is None else [entry.tensors]
    return own if entry.memory is None else [*own, *entry.memory["tensors"].values()]


def _facts(text: str) -> tuple[Fact, ...]:
    return tuple(Fact.from_dict(fact) for fact in json.loads(text))


def _told(check: Any, about: str) -> list[str]:
    try:
        check()
    except EditError as error:
        return [f"{about}: {error}"]
    return []


def _read(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()


def _checksum(row: Sequence[Any]) -> str:
    return _digest(list(row))


def _short(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _sql(path: Path) -> Iterator[None]:
    """SQLite's failures in our words."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if "readonly" in text or "read-only" in text:
            raise PermissionError(errno.EACCES, "nothing may be written here", str(path)) from error
        raise EditError(f"{path} cannot be read or written ({text}); if it is damaged, put the ledger back from a backup") from error
