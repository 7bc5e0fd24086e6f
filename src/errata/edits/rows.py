"""What stands in a ledger's database: its schema, its rows as values, and the checksum by which each of them is known to be whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from errata.edits.errors import EditError, LedgerBusy, LedgerDamaged, LedgerUnopened
from errata.facts import EditCase, Fact, Probe, prompt_key

if TYPE_CHECKING:
    from errata.edits.edit import Layout

FIELDS: Mapping[str, tuple[str, ...]] = {
    "base": ("number", "name", "fingerprint", "dtype"),
    "edits": (
        "number", "id", "made", "facts", "asked", "method", "objective", "seed", "parent", "layout", "tensors", "memory", "diagnostics",
        "metrics", "note", "limits", "active",
    ),
    "events": ("number", "at", "action", "edit", "reason"),
    "rejections": ("number", "at", "request", "facts", "reason", "metrics", "event"),
}  # fmt: skip
"""Of each table, in the order in which its checksum takes them."""
NUMBERS = ("number", "seed", "parent", "active", "edit", "event")
OPTIONAL = ("parent", "tensors", "memory", "metrics", "note", "limits", "reason")
"""Of these the columns that hold whole numbers, all others hold text; and those that may hold nothing."""

SCHEMA = (
    """
    CREATE TABLE base (
        number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, fingerprint TEXT NOT NULL, dtype TEXT NOT NULL, checksum TEXT NOT NULL
    );
    CREATE TABLE edits (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, made TEXT NOT NULL, facts TEXT NOT NULL, asked TEXT NOT NULL,
        method TEXT NOT NULL, objective TEXT NOT NULL, seed INTEGER NOT NULL, parent INTEGER, layout TEXT NOT NULL, tensors TEXT,
        memory TEXT, diagnostics TEXT NOT NULL, metrics TEXT, note TEXT, limits TEXT, active INTEGER NOT NULL, checksum TEXT NOT NULL
    );
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, action TEXT NOT NULL, edit INTEGER NOT NULL, reason TEXT,
        checksum TEXT NOT NULL
    );
    CREATE TABLE rejections (
        number INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, request TEXT NOT NULL, facts TEXT NOT NULL, reason TEXT NOT NULL,
        metrics TEXT, event INTEGER NOT NULL, checksum TEXT NOT NULL
    )
    """,
    "-- a layout names what a session goes on from, and not the keys any more, which older versions ask for",
)
"""What brings a database from version n to n + 1, for n from 0 on. A newer errata appends to it, and older ledgers are brought up when they
are next written to. AUTOINCREMENT keeps the last number given, so that a last row that is gone is missed."""

OUT = ("undone", "replaced")
"""The actions after which an edit is not active."""

Row = tuple[Any, ...]


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
    cases: the requests that it answers, with their rephrasings and locality prompts.
    metrics: what was measured before and after, if anything. limits: what it was not to break then; None where nothing was asked.
    layout, tensors, memory: what `Ledger.edit` reads.
    """

    number: int
    id: str
    made: str
    facts: tuple[Fact, ...]
    cases: tuple[EditCase, ...]
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
    limits: Mapping[str, Any] | None
    active: bool

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = {"number": self.number, "id": self.id, "made": self.made, "active": self.active, "parent": self.parent, "note": self.note}
        told |= {"facts": [fact.to_dict() for fact in self.facts], "method": self.method, "objective": self.objective, "seed": self.seed}
        told |= {"rephrasings": [probe.prompt for case in self.cases for probe in case.rephrases]}
        told |= {"matrices": [part["path"] for part in self.layout["deltas"]], "memory": self.memory and self.memory["kind"]}
        return told | {"diagnostics": self.diagnostics, "metrics": self.metrics}

    @property
    def objects(self) -> list[str]:
        """The names of its tensors."""
        own = [] if self.tensors is None else [self.tensors]
        return own if self.memory is None else [*own, *self.memory["tensors"].values()]


class Event(NamedTuple):
    """What happened to an edit: "made", "undone", "redone", or "replaced" by a new one."""

    number: int
    at: str
    action: str
    edit: int
    reason: str | None


class Rejection(NamedTuple):
    """A request that came to nothing, and why.

    request: see `errata.edits.ledger.request_of`; empty if it may be asked for again. event: number of the last one before it, 0 if there
    was none.
    """

    number: int
    at: str
    request: str
    facts: tuple[Fact, ...]
    reason: str
    metrics: Mapping[str, Any] | None
    event: int


def statements(cases: Sequence[EditCase], rephrasings: bool = True) -> dict[str, str]:
    """`prompt_key` of each prompt that requests speak about -> what they want behind it."""
    said = {prompt_key(probe.prompt): probe.answers[0].strip() for case in cases for probe in case.rephrases} if rephrasings else {}
    return said | {prompt_key(fact.text): fact.target.strip() for case in cases for fact in case.facts}


# Rows as they are written, and as values

LOCALITY = "locality"


def asked(cases: Sequence[EditCase]) -> list[dict[str, Any]]:
    """Of requests what is kept beside their facts; `_cases` puts them together again."""
    return [
        {
            "facts": len(case.facts),
            "rephrasings": [[probe.prompt, probe.answers[0]] for probe in case.rephrases],
            LOCALITY: list(case.meta.get(LOCALITY, ())),
        }
        for case in cases
    ]


def base_of(row: Row, where: Path) -> Base:
    """Raises LedgerDamaged where it is not what was written; so do the others."""
    return Base(*_whole("base", row, where)[1:])


def entry_of(row: Row, where: Path) -> Entry:
    """The edit in a row."""
    field = dict(zip(FIELDS["edits"], _whole("edits", row, where), strict=True))
    read = {name: _read(field[name]) for name in ("method", "objective", "layout", "memory", "diagnostics", "metrics", "limits")}
    facts = _facts(field["facts"])
    cases = _cases(facts, json.loads(field.pop("asked")))
    return Entry(**{**field, **read, "facts": facts, "cases": cases, "active": bool(field["active"])})


def event_of(row: Row, where: Path) -> Event:
    """The event in a row."""
    return Event(*_whole("events", row, where))


def rejection_of(row: Row, where: Path) -> Rejection:
    """The rejection in a row."""
    number, at, request, facts, reason, metrics, event = _whole("rejections", row, where)
    return Rejection(number, at, request, _facts(facts), reason, _read(metrics), event)


def checksum(table: str, values: Sequence[Any]) -> str:
    """SHA-256 of a row's values; a row of one table is none of another's."""
    return digest([table, *values])


def text(value: Any) -> str:
    """JSON, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON. What no JSON is (a damaged row may hold anything) counts as Python writes it."""
    written = json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)
    return hashlib.sha256(written.encode("utf-8", "backslashreplace")).hexdigest()


def _whole(table: str, row: Row, where: Path) -> Row:
    *values, told = row
    if checksum(table, values) != told:
        what = {"base": "that names its model", "edits": f"of edit {values[0]}", "events": f"of event {values[0]}"}
        said = what.get(table, f"of rejection {values[0]}")
        raise LedgerDamaged(f"the row {said} in {where} is damaged; put the ledger back from a backup")
    return tuple(values)


def _facts(written: str) -> tuple[Fact, ...]:
    return tuple(Fact.from_dict(fact) for fact in json.loads(written))


def _cases(facts: Sequence[Fact], beside: Sequence[Mapping[str, Any]]) -> tuple[EditCase, ...]:
    left, found = iter(facts), []
    for number, one in enumerate(beside):
        own = tuple(next(left) for _ in range(one["facts"]))
        rephrasings = tuple(Probe(prompt, (answer,)) for prompt, answer in one["rephrasings"])
        found.append(EditCase(str(number), own, rephrasings, meta={LOCALITY: tuple(one[LOCALITY])}))
    return tuple(found)


def _read(written: str | None) -> Any:
    return None if written is None else json.loads(written)


@contextmanager
def sql(path: Path) -> Iterator[None]:
    """SQLite's failures in our words."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise EditError(f"{path} was closed, or opened in another thread ({error}); open the ledger again here") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # of a damaged schema not even the message is text
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the kind; SQLite's finer codes differ from version to version
        if code == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if code == sqlite3.SQLITE_READONLY:
            raise PermissionError(errno.EACCES, "nothing may be written here", str(path)) from error
        if code == sqlite3.SQLITE_CANTOPEN:
            raise LedgerUnopened(f"{path} cannot be opened; look at its permissions, and those of its folder") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerBusy(f"{path} is in use by another process; try again when that is done") from error
        raise LedgerDamaged(f"{path} cannot be read or written ({error}); put the ledger back from a backup") from error
