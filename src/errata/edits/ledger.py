"""The ledger: every correction of one model as a durable row, its tensors beside it. Edits can be listed, undone in any order, redone.

A folder with an SQLite database and content-addressed tensors (`errata.edits.objects`). The weights that it stands for are those of the
base model with the active edits applied in the order of their numbers, so they depend on which edits are active and on nothing else.

What a call has returned is on the disk; a crash at any point leaves the ledger as it was before the call, or after it. Tensors are written
first and named by a row afterwards, so a row never names what is not there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from filelock import FileLock, Timeout

from errata.disk import drafted, folders, replacing
from errata.edits import rows
from errata.edits.errors import EditError, LedgerBusy, LedgerDamaged, LedgerUnopened
from errata.edits.objects import Objects
from errata.edits.rows import FIELDS, NUMBERS, OPTIONAL, OUT, SCHEMA, Base, Entry, Event, Rejection, Row, digest, sql, statements, text
from errata.facts import EditCase, Fact, check_text

if TYPE_CHECKING:
    from errata.edits.edit import Edit, Layout
    from errata.lm.model import LanguageModel

DATABASE, LOCK, OBJECTS = "ledger.sqlite", "ledger.lock", "objects"


class New(NamedTuple):
    """An edit that is to be entered.

    cases: the requests that it answers; without any, each of its facts is one. reason: what is said of its being made.
    limits: what it was not to break, as a record; None where nothing was asked of it.
    """

    edit: Edit
    seed: int = 0
    note: str | None = None
    cases: Sequence[EditCase] = ()
    reason: str | None = None
    limits: Mapping[str, Any] | None = None


class Ledger:
    """`with Ledger.open(folder) as ledger:` to read, `with Ledger.write(folder, lm) as ledger:` to change, one process at a time."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: FileLock | None) -> None:
        self.folder = folder
        self.objects = Objects(folder / OBJECTS)
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """To read. Raises EditError if there is no ledger, or one of a newer errata, LedgerDamaged if it cannot be read."""
        folder = Path(folder)
        if not is_ledger(folder):
            raise _none(folder)
        ledger = cls(folder, _reader(folder / DATABASE), None)
        try:
            ledger._version()
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def write(cls, folder: str | Path, lm: LanguageModel | None = None) -> Self:
        """To change; with `lm`, a new one of that model if there is none.

        Raises LedgerBusy if another process is writing, EditError if the folder is something else, the ledger is another model's or a newer
        errata's, LedgerDamaged if it cannot be read.
        """
        folder = Path(folder)
        base = None if lm is None else _base(lm)
        if not is_ledger(folder):
            if lm is None or (folder / OBJECTS).is_dir():
                raise _none(folder)
            check_place(folder)
            folders(folder)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise LedgerBusy(f"another process is writing to the ledger {folder}; wait until it is done, or stop it") from None
        path = folder / DATABASE
        try:
            if base is not None and not is_ledger(folder):
                _begin(path, base)
            with sql(path):
                ledger = cls(folder, sqlite3.connect(path, isolation_level=None), lock)
        except BaseException:
            lock.release()
            raise
        try:
            with sql(path):
                ledger._connection.execute("PRAGMA journal_mode = WAL")
                ledger._connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            ledger._migrate()
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
        found = self._rows("base")
        if len(found) != 1:
            raise LedgerDamaged(f"{self._path} does not name its model any more; put the ledger back from a backup")
        return rows.base_of(found[0], self._path)

    @property
    def checksum(self) -> str:
        """SHA-256 that names the weights it stands for: base and active edits, in their order."""
        return digest([self.base.fingerprint, *(row[0] for row in self._all("SELECT id FROM edits WHERE active ORDER BY number"))])

    def check_base(self, lm: LanguageModel) -> None:
        """Raise EditError if it is another model's."""
        if (base := self.base).fingerprint != lm.fingerprint:
            raise EditError(
                f"the ledger {self.folder} is about the model {base.name!r} ({base.dtype}, {base.fingerprint[:12]}), this is {lm.name!r} "
                f"({_short(lm)}, {lm.fingerprint[:12]}); load that model in that dtype, without edits in its weights"
            )

    # What is there

    def entries(self, active: bool | None = None) -> list[Entry]:
        """All edits, or only the active or undone ones, in their order. Raises LedgerDamaged for a row that is not what it was."""
        where = "" if active is None else f"WHERE active = {int(active)}"
        return [rows.entry_of(row, self._path) for row in self._rows("edits", where)]

    def entry(self, ref: int | str) -> Entry:
        """The edit of that number, or whose id begins so, by four characters or more. Raises EditError if there is none, or several."""
        said = str(ref).removeprefix("#")
        found = self._rows("edits", "WHERE number = ?", int(said)) if said.isdecimal() and len(said) < 19 else []
        if not found and len(said) >= 4:
            found = self._rows("edits", "WHERE substr(id, 1, ?) = ?", len(said), said)
        if len(found) != 1:
            (count,) = self._all("SELECT count(*) FROM edits")[0]
            many = f"{len(found)} edits of {self.folder} begin" if found else f"no edit of {self.folder} has the number or begins"
            raise EditError(f"{many} with {said!r}; there are {count}, numbered from 1: see errata log {self.folder}")
        return rows.entry_of(found[0], self._path)

    def events(self) -> list[Event]:
        """What happened, in its order."""
        return [rows.event_of(row, self._path) for row in self._rows("events")]

    def rejections(self) -> list[Rejection]:
        """What came to nothing, in its order."""
        return [rows.rejection_of(row, self._path) for row in self._rows("rejections")]

    def built_on(self, numbers: Iterable[int], through: bool = False) -> list[int]:
        """The active edits, others than these, that were made while one of them was in the model: they would be others without it.

        through: also those that were made while one of these was, and so on: they would be others if these were made again.
        """
        asked, there, found = set(numbers), set[int](), set[int]()
        for event in self.events():
            if event.action == "made" and (asked | found if through else asked) & there:
                found.add(event.edit)
            (there.discard if event.action in OUT else there.add)(event.edit)
        return sorted((found & there) - asked)

    def edit(self, entry: Entry, lm: LanguageModel) -> Edit:
        """The edit itself, of the model of this ledger.

        Raises LedgerDamaged if its tensors are missing or not what they were, EditError if the model is another.
        """
        from errata.edits.edit import Edit, assembled  # torch: not for listing and undoing
        from errata.edits.memory import load_memory

        self.check_base(lm)
        tensors = {} if entry.tensors is None else self.objects.get(entry.tensors)
        try:
            deltas, trail = assembled(entry.layout, tensors)
            memory = None
            if entry.memory is not None:
                parts = {name: self.objects.get(place)["tensor"] for name, place in entry.memory["tensors"].items()}
                memory = load_memory({**entry.memory, "tensors": parts})
        except (KeyError, TypeError) as error:
            said = f"the tensors of edit {entry.number} of {self.folder} are not those that its row names ({error})"
            raise LedgerDamaged(f"{said}; put the ledger back from a backup") from error
        asked = (entry.facts, entry.method, entry.objective, entry.diagnostics)
        return Edit(lm, deltas, *asked, memory=memory, metrics=entry.metrics, trail=trail)

    def edits(self, lm: LanguageModel) -> list[Edit]:
        """The active ones in their order; see `edit`."""
        return [self.edit(entry, lm) for entry in self.entries(active=True)]

    def apply(self, lm: LanguageModel) -> list[Edit]:
        """Bring the model, to which nothing is applied, to where the ledger stands; the edits that are applied then. All of them, or none.

        Raises EditError if edits are applied already.
        """
        from errata.edits.stack import Stack

        check_unedited(lm)
        edits = self.edits(lm)
        Stack.of(lm).apply(*edits)
        return edits

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """While it lasts, everything that is read is of one moment, whatever another process writes."""
        outer = self._connection.in_transaction
        if not outer:
            self._all("BEGIN")
        try:
            yield
        finally:
            if not outer:
                with suppress(sqlite3.Error):  # SQLite ends it itself where the database cannot be read
                    self._connection.execute("ROLLBACK")

    def copy(self, folder: str | Path) -> None:
        """All of it, history and undone edits too, as a new ledger. Raises EditError if the folder is in use, LedgerDamaged for what is not
        what it was."""
        folder = Path(folder)
        check_place(folder)
        with self.snapshot(), drafted(folder) as draft:
            into = Objects(draft / OBJECTS)
            for name in sorted({name for entry in self.entries() for name in entry.objects}):
                into.take(name, self.objects)
            path = draft / DATABASE
            with sql(path), replacing(path) as copy, closing(sqlite3.connect(copy)) as connection:
                self._connection.backup(connection)

    # What can be done

    def add(self, *new: New, undoing: Mapping[int, str | None] | None = None, replacing: bool = False) -> list[Entry]:
        """Enter edits, and undo others, in one step; the new entries.

        undoing: number -> reason. replacing: as what happened these are "replaced", not "undone".
        Raises EditError for an edit of another model, or a memory that does not go on from those of the active edits.
        """
        base = self.base
        for one in new:
            if one.edit.lm_fingerprint != base.fingerprint:
                raise EditError(f"{one.edit} was made for another model than the ledger {self.folder} is about ({base.name!r})")
            if one.cases and [fact for case in one.cases for fact in case.facts] != list(one.edit.facts):
                raise EditError(f"{one.edit} does not answer the requests it is entered with; give the cases whose facts it holds")
        with self._sweeping(), self._transaction():
            kept = [self._kept(one.edit) for one in new]  # before any row names them
            for number, reason in (undoing or {}).items():
                self._set([number], "replaced" if replacing else "undone", reason)
            numbers = [self._enter(one, base, *parts) for one, parts in zip(new, kept, strict=True)]
            self._check_memories()
        return [self.entry(number) for number in numbers]

    def undo(self, *numbers: int, reason: str | None = None) -> None:
        """Take edits out, in one step: they stay in the ledger, and not in the weights. Raises EditError if one is undone already, or a
        later one holds what it keeps beside the weights."""
        with self._transaction():
            self._set(numbers, "undone", reason)
            self._check_memories()

    def redo(self, *numbers: int, reason: str | None = None) -> None:
        """Put edits back into their places in the order, in one step. Raises EditError if one is active already, or another active edit
        speaks of the same."""
        with self._transaction():
            back = self._set(numbers, "redone", reason)
            self._check_alone(back)
            self._check_memories()

    def reject(self, request: str, facts: Sequence[Fact], reason: str, metrics: Mapping[str, Any] | None = None) -> None:
        """Record what came to nothing, and why."""
        with self._transaction():
            last = self._last("events")
            told = (text([fact.to_dict() for fact in facts]), reason, metrics and text(metrics))
            self._insert("rejections", self._last("rejections") + 1, _now(), request, *told, last)

    def verify(self, lm: LanguageModel | None = None) -> list[str]:
        """What is wrong with it, one line each: a damaged database or row, rows that are gone, tensors that are missing or not what they
        were, states that do not follow from what happened, another base model. Empty if all is well."""
        with self.snapshot():
            return self._verify(lm)

    def _verify(self, lm: LanguageModel | None) -> list[str]:
        problems: list[str] = []
        try:
            problems += [f"{self._path}: {row[0]}" for row in self._all("PRAGMA integrity_check") if row[0] != "ok"]
            problems += _told(lambda: self.base)
            problems += [gap for table in FIELDS for gap in self._gaps(table)]
            entries = self._each("edits", rows.entry_of, problems)
            events = self._each("events", rows.event_of, problems)
            self._each("rejections", rows.rejection_of, problems)
            problems += _strayed(entries, events)
        except EditError as error:  # not even a table can be read
            return [*problems, str(error)]
        known = lm is not None and not problems and self.base.fingerprint == lm.fingerprint
        for entry in entries:
            about = f"edit {entry.number}: "
            if lm is not None and known:
                problems += _told(partial(self.edit, entry, lm), about)
            else:
                problems += [problem for name in entry.objects for problem in _told(partial(self.objects.get, name), about)]
        if not problems:
            problems += _told(self._check_memories)
            problems += _told(lambda: self.check_base(lm)) if lm is not None else []
        return problems

    # How

    @property
    def _path(self) -> Path:
        return self.folder / DATABASE

    def _kept(self, edit: Edit) -> tuple[Layout, str | None, dict[str, Any] | None]:
        """Its tensors, put away: layout and name of those of deltas and trail, and its memory with names in the place of tensors."""
        layout, tensors = edit.parts()
        memory = None if edit.memory is None else edit.memory.state()
        if memory is not None:  # each by itself: what an edit has in common with the one before is there already
            memory["tensors"] = {name: self.objects.put({"tensor": tensor}) for name, tensor in memory["tensors"].items()}
        try:
            text([edit.method, edit.objective, edit.diagnostics, memory])
        except (TypeError, ValueError) as error:
            raise EditError(f"{edit} cannot be kept: method, objective and diagnostics must be plain JSON values ({error})") from error
        return layout, self.objects.put(tensors) if tensors else None, memory

    def _enter(self, new: New, base: Base, layout: Layout, tensors: str | None, memory: dict[str, Any] | None) -> int:
        """Its row, and that it was made; its number."""
        edit, facts = new.edit, [fact.to_dict() for fact in new.edit.facts]
        cases = new.cases or [EditCase(str(number), (fact,)) for number, fact in enumerate(edit.facts)]
        named = [base.fingerprint, facts, edit.method, edit.objective, new.seed, layout, tensors, memory]
        (parent,) = self._all("SELECT max(number) FROM edits WHERE active")[0]
        check_text(new.note or "")
        check_seed(new.seed)
        number = self._last("edits") + 1
        self._insert(
            "edits", number, digest(named)[:12], _now(), text(facts), text(rows.asked(cases)), text(edit.method), text(edit.objective),
            new.seed, parent, text(layout), tensors, memory and text(memory), text(edit.diagnostics), edit.metrics and text(edit.metrics),
            new.note, new.limits and text(new.limits), 1,
        )  # fmt: skip
        self._happened("made", number, new.reason)
        return number

    def _set(self, numbers: Sequence[int], action: str, reason: str | None) -> list[Entry]:
        """Bring edits to that state; as they were before."""
        active = action not in OUT
        found = list({entry.number: entry for entry in map(self.entry, numbers)}.values())
        for entry in found:
            if entry.active == active:
                raise EditError(f"edit {entry.number} of {self.folder} is {'active' if active else 'undone'} already; nothing was changed")
            ((*row, _),) = self._rows("edits", "WHERE number = ?", entry.number)
            row[-1] = int(active)
            self._all("UPDATE edits SET active = ?, checksum = ? WHERE number = ?", int(active), rows.checksum("edits", row), entry.number)
            self._happened(action, entry.number, reason)
        return found

    def _happened(self, action: str, number: int, reason: str | None) -> None:
        check_text(reason or "")
        self._insert("events", self._last("events") + 1, _now(), action, number, reason)

    def _check_alone(self, back: Sequence[Entry]) -> None:
        """Raise EditError if an edit that comes back says, doubles or contradicts what another active one says."""
        active = [(other, statements(other.cases)) for other in self.entries(active=True)]
        for entry in back:
            mine = statements(entry.cases)
            doubled = statements(entry.cases, rephrasings=False)
            for other, theirs in active:
                if other.number == entry.number:
                    continue
                instead = f"undo {other.number} first, or leave {entry.number} undone; nothing was changed"
                for prompt in mine.keys() & theirs.keys():
                    if mine[prompt] != theirs[prompt]:
                        raise EditError(
                            f"edit {entry.number} says {mine[prompt]!r} where edit {other.number} says {theirs[prompt]!r}; {instead}"
                        )
                if doubled.keys() & statements(other.cases, rephrasings=False).keys():
                    raise EditError(f"edit {other.number} says already what edit {entry.number} says; {instead}")

    def _check_memories(self) -> None:
        """A memory holds those of all earlier edits of its session, so each must go on from the one before."""
        before: str | None = None
        for row in self._rows("edits", "WHERE active AND memory IS NOT NULL"):
            entry = rows.entry_of(row, self._path)
            assert entry.memory is not None
            if entry.memory["parent"] != before:
                raise EditError(
                    f"edit {entry.number} keeps a memory beside the weights that holds those of earlier edits, and would not stand behind "
                    "these: undo such edits from the last one back, redo them from the first one on, or undo with rebase; "
                    "nothing was changed"
                )
            before = entry.memory["id"]

    def _gaps(self, table: str) -> list[str]:
        """Rows are numbered from 1 on, and never removed."""
        there, last = [number for (number,) in self._all(f"SELECT number FROM {table} ORDER BY number")], self._last(table)
        if there == list(range(1, last + 1)):
            return []
        return [f"{self._path}: {table} should be numbered from 1 to {last}, and there are {len(there)}; put the ledger back from a backup"]

    def _each(self, table: str, read: Callable[[Row, Path], Any], problems: list[str]) -> list[Any]:
        """The rows that are whole; what is said of the others goes to the problems."""
        found = []
        for row in self._rows(table):
            try:
                found.append(read(row, self._path))
            except LedgerDamaged as error:
                problems.append(str(error))
        return found

    def _migrate(self) -> None:
        if (version := self._version()) < len(SCHEMA):
            with self._transaction():
                _bring_up(self._connection, version)
        self._sweep()

    def _version(self) -> int:
        ((version,),) = self._all("PRAGMA user_version")
        if version > len(SCHEMA):
            raise EditError(f"{self.folder} has schema {version}, this errata reads up to {len(SCHEMA)}; install a newer errata")
        if version < 1:
            raise LedgerDamaged(f"{self._path} is no ledger's database, or damaged (schema {version}); put the ledger back from a backup")
        return int(version)

    def _sweep(self) -> None:
        self.objects.sweep({name for entry in self.entries() for name in entry.objects})

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

    def _rows(self, table: str, where: str = "", *values: Any) -> list[Row]:
        return self._all(f"SELECT {', '.join(FIELDS[table])}, checksum FROM {table} {where} ORDER BY number", *values)

    def _last(self, table: str) -> int:
        """The last number that was given."""
        ((last,),) = self._all("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = ?", table)
        if not isinstance(last, int):
            raise LedgerDamaged(f"{self._path} does not know its last row any more; put the ledger back from a backup")
        return last

    def _insert(self, table: str, *values: Any) -> None:
        for name, value in zip(FIELDS[table], values, strict=True):  # SQLite would make of another type what its row's checksum is not of
            if type(value) is not (int if name in NUMBERS else str) and not (value is None and name in OPTIONAL):
                raise EditError(f"{name} must be {'a whole number' if name in NUMBERS else 'text'}, got {value!r}")
        with sql(self._path):
            _insert(self._connection, table, *values)

    def _all(self, statement: str, *values: Any) -> list[Row]:
        with sql(self._path):
            return self._connection.execute(statement, values).fetchall()


def _none(folder: Path) -> EditError:
    """Why it holds no ledger."""
    if (folder / OBJECTS).is_dir():
        return LedgerDamaged(f"{folder} has a ledger's tensors, and its {DATABASE} is gone or empty; put it back from a backup")
    return EditError(f"{folder} holds no ledger; give the folder that 'errata edit --out' wrote")


def check_unedited(lm: LanguageModel) -> None:
    """Raise EditError if edits are applied to it."""
    from errata.edits.stack import Stack

    if Stack.of(lm).active:
        raise EditError(f"{lm.name} has edits applied; revert them first: a ledger is about the unedited model")


def is_ledger(folder: Path) -> bool:
    """Whether the folder holds a ledger. Its database comes into being whole, so an empty one is none."""
    path = folder / DATABASE
    return path.is_file() and path.stat().st_size > 0


def check_place(folder: Path) -> None:
    """Raise EditError where a new ledger cannot be: what is there already, and is not the trace of one that was never begun."""
    if is_ledger(folder):
        raise EditError(f"{folder} holds a ledger already; give another place")
    if folder.exists() and (not folder.is_dir() or not all(path.name == LOCK or DATABASE in path.name for path in folder.iterdir())):
        raise EditError(f"{folder} exists already and is no ledger; give another place")


def request_of(
    case: EditCase,
    method: Mapping[str, Any],
    objective: Mapping[str, Any] | None,
    seed: int,
    limits: Mapping[str, Any] | None = None,
    beside: Sequence[EditCase] = (),
) -> str:
    """Names a request: the same facts, rephrasings and locality prompts, asked for in the same way, together with the same others."""
    told = [[fact.to_dict() for one in (case, *beside) for fact in one.facts], rows.asked([case, *beside])]
    return digest([told, method, objective, seed, limits])


def check_seed(seed: int) -> None:
    """Raise EditError for one that SQLite cannot keep."""
    if not -(2**63) <= seed < 2**63:
        raise EditError(f"the seed {seed} has more than 63 bits; give a smaller one")


def _begin(path: Path, base: Base) -> None:
    """A new database, which is there with everything in it or not at all."""
    for left in path.parent.glob(f".{path.name}.*"):  # by one that was killed
        left.unlink(missing_ok=True)
    with sql(path), replacing(path) as draft, closing(sqlite3.connect(draft)) as connection:
        _bring_up(connection, 0)
        _insert(connection, "base", 1, *base)
        connection.commit()


def _bring_up(connection: sqlite3.Connection, version: int) -> None:
    for script in SCHEMA[version:]:
        for statement in script.split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(SCHEMA)}")


def _insert(connection: sqlite3.Connection, table: str, *values: Any) -> None:
    marks = ", ".join("?" * (len(values) + 1))
    row = (*values, rows.checksum(table, values))
    connection.execute(f"INSERT INTO {table} ({', '.join(FIELDS[table])}, checksum) VALUES ({marks})", row)


def _reader(path: Path) -> sqlite3.Connection:
    """To read beside a writer; where SQLite may not put its files for sharing, as a file that does not change."""
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        with sql(path):
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
        try:
            with sql(path):
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except (PermissionError, LedgerUnopened) as error:
            connection.close()
            log = path.with_name(f"{path.name}-wal")
            if "immutable" in mode:
                raise
            if log.exists() and log.stat().st_size:
                raise EditError(
                    f"{path} cannot be read here: its last changes lie in {log.name}, and nothing may be written beside it; "
                    f"copy the folder to where you may write, or run 'errata verify {path.parent}' once as one who may"
                ) from error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise AssertionError("one of the two was returned or raised")


def _strayed(entries: Sequence[Entry], events: Sequence[Event]) -> list[str]:
    """States that do not follow from what happened."""
    problems = []
    happened: dict[int, list[str]] = {entry.number: [] for entry in entries}
    for event in events:
        if event.edit in happened:
            happened[event.edit].append(event.action)
        else:
            problems.append(f"event {event.number} is of edit {event.edit}, which cannot be read")
    for entry in entries:
        actions = happened[entry.number]
        if actions[:1] != ["made"] or actions.count("made") != 1:
            problems.append(f"edit {entry.number} was not made once, and first of all")
        elif (actions[-1] not in OUT) != entry.active:
            problems.append(f"edit {entry.number} is {'active' if entry.active else 'undone'}, which is not what happened to it last")
    return problems


def _told(check: Callable[[], object], about: str = "") -> list[str]:
    try:
        check()
    except EditError as error:
        return [f"{about}{error}"]
    return []


def _base(lm: LanguageModel) -> Base:
    """The model as it stands in a ledger, to be found again from anywhere."""
    from errata.lm.loading import address  # transformers: not for listing and undoing

    if not hasattr(lm, "fingerprint"):
        raise EditError(f"a ledger is begun with a model, got {type(lm).__name__} {lm!r}; load it first: errata.load({lm!r})")
    return Base(address(lm.name), lm.fingerprint, _short(lm))


def _short(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
