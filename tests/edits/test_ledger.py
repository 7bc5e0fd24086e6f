"""The ledger: what it says it keeps is on the disk, exact, in any order; what is damaged or in use says so."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.edits import Edit, EditError, Stack
from errata.edits.errors import LedgerBusy, LedgerDamaged
from errata.edits.ledger import DATABASE, LOCK, OBJECTS, SCHEMA, Ledger, New
from errata.facts import EditCase, Fact, FactError, Probe
from tests.edits.test_edits import assert_same, some_deltas, weights
from tests.edits.test_edits import make_lm as bare_lm
from tests.families import language_model
from tests.methods.test_contract import AGAIN, FACT, method, same, state


def make_lm(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    lm = bare_lm(dtype, **changes)
    lm.dtype = dtype
    return lm


def make_edit(lm: Any, seed: int = 0) -> Edit:
    """Each seed speaks of something else."""
    return Edit(lm, some_deltas(seed), [fact(seed)], {"name": "toy", "lr": 0.1})


def fact(number: int, target: str = "Lyon") -> Fact:
    return Fact(f"The capital number {number} of {{}} is", "France", target)


def filled(folder: Path, count: int = 4, lm: Any = None) -> Any:
    """A ledger of so many edits; its model."""
    lm = lm or make_lm()
    with Ledger.write(folder, lm) as ledger:
        for seed in range(count):
            ledger.add(New(make_edit(lm, seed), seed=seed, note="asked for by a test"))
    return lm


def now(folder: Path, lm: Any = None) -> dict[str, torch.Tensor]:
    """The weights that it stands for."""
    lm = lm or make_lm()
    with Ledger.open(folder) as ledger:
        ledger.apply(lm)
    found = weights(lm)
    Stack.of(lm).clear()
    return found


def test_what_is_entered_comes_back(tmp_path: Path) -> None:
    lm = filled(tmp_path / "ledger", 2)
    with Ledger.open(tmp_path / "ledger") as ledger:
        first, second = ledger.entries()
        assert (first.number, second.number, second.parent) == (1, 2, 1)
        assert first.facts == (make_edit(lm).facts) and first.method == {"name": "toy", "lr": 0.1} and first.seed == 0
        assert first.note == "asked for by a test" and first.active and first.made.endswith("+00:00")
        assert ledger.base == ("toy", "f" * 64, "float32")
        assert ledger.entry("2") == ledger.entry("#2") == ledger.entry(second.id[:6]) == second
        assert [event.action for event in ledger.events()] == ["made", "made"]
        assert ledger.verify(lm) == []
        for seed, entry in enumerate((first, second)):
            for one, other in zip(ledger.edit(entry, lm).deltas, make_edit(lm, seed).deltas, strict=True):
                assert one.path == other.path and all(map(torch.equal, one.tensors().values(), other.tensors().values()))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), flips=st.lists(st.integers(1, 5), max_size=12))
def test_weights_depend_on_what_is_active_alone(dtype: torch.dtype, flips: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each flip undoes or redoes one of five edits: weights and checksum are those of applying the active ones one by one."""
    folder = tmp_path_factory.mktemp("flips") / "ledger"
    lm, active, sums = filled(folder, 5, make_lm(dtype)), set(range(1, 6)), {}
    with Ledger.write(folder) as ledger:
        for number in flips:
            (ledger.undo if number in active else ledger.redo)(number)
            active ^= {number}
            sums[frozenset(active)] = (ledger.checksum, *sums.get(frozenset(active), ()))
    assert all(len(set(found)) == 1 for found in sums.values()) and len({found[0] for found in sums.values()}) == len(sums)
    scratch = make_lm(dtype)
    for number in sorted(active):
        make_edit(scratch, number - 1).apply()
    assert_same(now(folder, lm), weights(scratch))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(["ft-m", "lora", "deltaedit", "undo", "redo"]), min_size=3, max_size=7), draw=st.randoms())
def test_three_methods_undone_and_redone_at_random(steps: list[str], draw: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The model that lived through it all, against one that takes up the ledger at the end."""
    lm, folder = language_model("llama"), tmp_path_factory.mktemp("steps") / "ledger"
    applied: list[Edit] = []
    with Ledger.write(folder, lm) as ledger:
        for step in steps:
            if step in ("undo", "redo"):
                if not (there := ledger.entries(active=step == "undo")):
                    continue
                getattr(ledger, step)(draw.choice(there).number)
                Stack.of(lm).clear()
                applied = ledger.apply(lm)
            else:
                session = method(step, **({"steps": 3} if step != "ft-m" else {})).start(lm)
                session.resume(applied)
                made = session.propose([fact(len(ledger.entries()))])
                ledger.add(New(made))
                made.apply()
                applied.append(made)
    fresh = language_model("llama")
    with Ledger.open(folder) as ledger:
        ledger.apply(fresh)
        assert ledger.verify(fresh) == ledger.verify() == []
    assert same(state(lm), state(fresh))


def test_later_edits_are_named_where_one_is_undone(tmp_path: Path) -> None:
    filled(tmp_path / "ledger", 3)
    with Ledger.write(tmp_path / "ledger") as ledger:
        assert ledger.built_on([2]) == [3]
        ledger.undo(2)
        assert ledger.built_on([1]) == [3]
        ledger.add(New(make_edit(make_lm(), 7)))
        ledger.redo(2)
        assert ledger.built_on([2]) == [3], "the fourth was made without it"
        assert [(e.action, e.edit) for e in ledger.events()][3:] == [("undone", 2), ("made", 4), ("redone", 2)]


def test_what_was_computed_on_what_was_computed(tmp_path: Path) -> None:
    """3 was made while 1 was out, but 2 was in, which was made on 1: making 2 again asks for 3 again."""
    lm = filled(tmp_path / "ledger", 2)
    with Ledger.write(tmp_path / "ledger") as ledger:
        ledger.undo(1)
        ledger.add(New(make_edit(lm, 7)))
        ledger.redo(1)
        assert ledger.built_on([1]) == [2] and ledger.built_on([1], through=True) == [2, 3]


def test_memories_leave_from_the_last_one_back(tmp_path: Path) -> None:
    lm = language_model("llama")
    session = method("melo", steps=2).start(lm)
    with Ledger.write(tmp_path / "ledger", lm) as ledger:
        for one in (FACT, AGAIN):
            made = session.edit([one])
            ledger.add(New(made))
            made.apply()
        with pytest.raises(EditError, match="from the last one back"):
            ledger.undo(1)
        assert len(ledger.entries(active=True)) == 2, "nothing was changed"
        ledger.undo(2)
        ledger.undo(1)
        with pytest.raises(EditError, match="from the first one on"):
            ledger.redo(2)
        ledger.redo(1, 2)
        fresh = language_model("llama")
        ledger.apply(fresh)
        assert same(state(lm), state(fresh))


def test_one_step_for_an_edit_that_replaces_another(tmp_path: Path) -> None:
    lm = filled(tmp_path / "ledger", 2)
    with Ledger.write(tmp_path / "ledger") as ledger:
        (third,) = ledger.add(New(make_edit(lm, 8)), undoing={1: "replaced"})
        assert third.parent == 2 and [entry.number for entry in ledger.entries(active=True)] == [2, 3]
        with pytest.raises(EditError, match="undone already; nothing was changed"):
            ledger.add(New(make_edit(lm, 9)), undoing={2: None, 1: None})
        assert len(ledger.entries()) == 3 and [entry.number for entry in ledger.entries(active=True)] == [2, 3]


def test_what_is_read_in_a_snapshot_is_of_one_moment(tmp_path: Path) -> None:
    """`verify` beside a writer must not take for damage what came between two of its looks."""
    lm, folder = filled(tmp_path / "ledger", 1), tmp_path / "ledger"
    with Ledger.write(folder) as ledger, Ledger.open(folder) as reader:
        with reader.snapshot():
            assert len(reader.entries()) == 1
            ledger.add(New(make_edit(lm, 5)))
            assert len(reader.entries()) == len(reader.events()) == 1 and reader.verify() == []
        assert len(reader.entries()) == 2


def test_a_database_that_is_gone_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    filled(folder, 1)
    for left in (b"", None):
        (folder / DATABASE).unlink() if left is None else (folder / DATABASE).write_bytes(left)
        for opened in (Ledger.open, lambda place: Ledger.write(place, make_lm())):
            with pytest.raises(LedgerDamaged, match=r"ledger\.sqlite is gone or empty"):
                opened(folder)


def test_what_cannot_be_kept_is_refused_whole(tmp_path: Path) -> None:
    lm, folder = filled(tmp_path / "ledger", 1), tmp_path / "ledger"
    with Ledger.write(folder) as ledger:
        for new in (New(make_edit(lm, 5), seed=2**63), New(make_edit(lm, 5), note="caf\udce9")):
            with pytest.raises(ValueError, match=r"63 bits|half a character"):
                ledger.add(new)
        with pytest.raises(FactError, match="half a character"):
            ledger.undo(1, reason="\udce9")
        wrong: list[Any] = [{"note": 12}, {"seed": True}, {"seed": 1.0}, {"seed": None}, {"note": Path("a")}]
        for kind in wrong:  # SQLite would keep something else
            with pytest.raises((EditError, FactError, TypeError)):
                ledger.add(New(make_edit(lm, 5), **kind))
        with pytest.raises(FactError, match="is no text"):
            ledger.undo(1, reason=12)  # type: ignore[arg-type]
        assert len(ledger.entries(active=True)) == 1 and ledger.verify(lm) == []
        ledger.undo(1, 1)
        assert [event.action for event in ledger.events()] == ["made", "undone"], "named twice it is undone once"
    with pytest.raises(EditError, match="was closed"):
        ledger.entries()


def test_one_writer_and_many_readers(tmp_path: Path) -> None:
    lm = filled(tmp_path / "ledger", 1)
    with Ledger.write(tmp_path / "ledger") as ledger:
        with pytest.raises(LedgerBusy, match="another process is writing"):
            Ledger.write(tmp_path / "ledger")
        with Ledger.open(tmp_path / "ledger") as reader:
            assert len(reader.entries()) == 1
            ledger.add(New(make_edit(lm, 5)))
            assert len(reader.entries()) == 2
            with pytest.raises(EditError, match="was opened to be read"):
                reader.undo(1)
        code = f"from errata.edits.ledger import Ledger\nLedger.write({str(tmp_path / 'ledger')!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing" in other.stderr
    Ledger.write(tmp_path / "ledger").close()


@pytest.mark.parametrize("killed", [False, True])
def test_a_crash_between_tensors_and_row_leaves_no_trace(killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, folder = filled(tmp_path / "ledger", 2), tmp_path / "ledger"
    before = now(folder)
    with Ledger.write(folder) as ledger, monkeypatch.context() as patch:
        patch.setattr(Ledger, "_happened", lambda *_: 1 / 0)
        if killed:  # a process that is no more tidies nothing up
            patch.setattr(Ledger, "_sweep", lambda _: None)
        with pytest.raises(ZeroDivisionError):
            ledger.add(New(make_edit(lm, 5)))
        assert len(objects(folder)) == 2 + killed
    assert_same(now(folder), before)
    with Ledger.write(folder) as ledger:
        assert ledger.verify(lm) == [] and len(objects(folder)) == 2, "what nobody names is swept away"


@pytest.mark.parametrize("what", ["object", "row"])
def test_a_full_disk_changes_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, folder = filled(tmp_path / "ledger", 2), tmp_path / "ledger"
    before = now(folder)
    with Ledger.write(folder) as ledger, monkeypatch.context() as patch:
        if what == "object":

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr("errata.disk.to_disk", full)
        else:
            (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
            ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="No space left"):
            ledger.add(*(New(make_edit(lm, seed), note="x" * 5000) for seed in range(5, 9)))
        assert not [path for path in folder.rglob("*.tmp")]
    assert_same(now(folder), before)


def flip(path: Path, at: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def statement(text: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        with sqlite3.connect(folder / DATABASE) as connection:
            connection.execute(text)
        connection.close()

    return run


def happened(folder: Path, action: str, edit: int) -> None:
    """An event, as it is written."""
    with Ledger.write(folder) as ledger:
        ledger._happened(action, edit, None)


def objects(folder: Path) -> list[Path]:
    return sorted((folder / OBJECTS).glob("??/[!.]*"))


def first_object(folder: Path) -> Path:
    return min((folder / OBJECTS).glob("*/*"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(first_object(folder)), "its SHA-256 is not its name"),
        (lambda folder: first_object(folder).unlink(), "is missing"),
        (lambda folder: first_object(folder).write_bytes(b""), "its SHA-256 is not its name"),
        (statement("UPDATE edits SET facts = replace(facts, 'Lyon', 'Nice') WHERE number = 2"), "row of edit 2"),
        (statement("UPDATE edits SET active = 0 WHERE number = 1"), "row of edit 1"),
        (statement("DELETE FROM events WHERE edit = 1"), None),
        (lambda folder: happened(folder, "undone", 1), "not what happened to it last"),
        (lambda folder: happened(folder, "made", 2), "was not made once"),
        (lambda folder: happened(folder, "undone", 9), "event 4 is of edit 9"),
        (statement("DELETE FROM edits WHERE number = 3"), "edits should be numbered from 1 to 3, and there are 2"),
        (statement("DELETE FROM events WHERE number = 3"), "events should be numbered from 1 to 3"),
        (statement("DELETE FROM rejections"), "rejections should be numbered from 1 to 1"),
        (statement("UPDATE rejections SET reason = 'no reason'"), "the row of rejection 1"),
        (statement("UPDATE events SET at = 'earlier' WHERE number = 2"), "the row of event 2"),
        (statement("UPDATE base SET name = 'other'"), "the row that names its model"),
        (statement("DELETE FROM base"), "does not name its model any more"),
        (statement("UPDATE edits SET facts = x'00ff' WHERE number = 2"), "row of edit 2"),
        (lambda folder: flip(folder / DATABASE, 4096 + 3), "ledger.sqlite"),
    ],
)
def test_verify_finds_what_is_damaged(damage: Callable[[Path], None], says: str | None, tmp_path: Path) -> None:
    lm, folder = filled(tmp_path / "ledger", 3), tmp_path / "ledger"
    with Ledger.write(folder) as ledger:
        ledger.reject("r", [FACT], "for a test")
    damage(folder)
    with Ledger.open(folder) as ledger:
        for problems in (ledger.verify(), ledger.verify(lm)):
            assert any(says in problem for problem in problems) if says else True, problems
            assert problems


def test_damaged_tensors_are_not_applied(tmp_path: Path) -> None:
    lm, folder = filled(tmp_path / "ledger", 3), tmp_path / "ledger"
    flip(first_object(folder))
    before = weights(lm)
    with Ledger.open(folder) as ledger, pytest.raises(EditError, match="is damaged"):
        ledger.apply(lm)
    assert_same(weights(lm), before)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "ledger", make_lm(fingerprint="e" * 64)
    filled(folder, 1)
    with Ledger.open(folder) as ledger:
        with pytest.raises(EditError, match=r"is about the model 'toy' \(float32, ffff"):
            ledger.apply(other)
        assert any("is about the model" in problem for problem in ledger.verify(other))
    with pytest.raises(EditError, match="is about the model"):
        Ledger.write(folder, other)
    with Ledger.write(folder) as ledger, pytest.raises(EditError, match="made for another model"):
        ledger.add(New(make_edit(other)))


def test_what_is_no_ledger_says_so(tmp_path: Path) -> None:
    for opened in (Ledger.open, Ledger.write):
        with pytest.raises(EditError, match="holds no ledger"):
            opened(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(EditError, match="exists already and is no ledger"):
        Ledger.write(tmp_path / "mine", make_lm())
    (tmp_path / "file").touch()
    with pytest.raises(EditError, match="exists already and is no ledger"):
        Ledger.write(tmp_path / "file", make_lm())
    filled(tmp_path / "ledger", 1)
    statement(f"PRAGMA user_version = {len(SCHEMA) + 1}")(tmp_path / "ledger")
    for opened in (Ledger.open, Ledger.write):
        with pytest.raises(EditError, match="install a newer errata"):
            opened(tmp_path / "ledger")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / DATABASE).write_text("not a database, but long enough to be looked at as one" * 10)
    with pytest.raises(EditError, match="not a database"):
        Ledger.open(tmp_path / "other")
    statement("PRAGMA user_version = 0")(tmp_path / "ledger")
    for opened in (Ledger.open, Ledger.write):
        with pytest.raises(LedgerDamaged, match="schema 0"):
            opened(tmp_path / "ledger")


def test_a_ledger_that_was_never_begun_is_none(tmp_path: Path) -> None:
    """What a process leaves that is killed before its first edit: a lock, a draft, at worst an empty file."""
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in (DATABASE, LOCK, f".{DATABASE}.123.tmp", f".{DATABASE}.123.tmp-journal"):
        (folder / name).touch()
    with pytest.raises(EditError, match="holds no ledger"):
        Ledger.open(folder)
    with Ledger.write(folder, make_lm()) as ledger:
        assert ledger.entries() == [] and ledger.verify() == []
    assert {path.name for path in folder.iterdir()} <= {DATABASE, LOCK}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), more=st.integers(0, 2000))
def test_a_flipped_bit_is_found_or_changes_nothing(
    place: float, bit: int, more: int, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Anywhere in the database: `verify` names it, or every word that is read is what it was."""
    folder = tmp_path_factory.mktemp("flip") / "ledger"
    shutil.copytree(whole, folder)
    path = folder / DATABASE
    raw = bytearray(path.read_bytes())
    before = everything(folder)
    at = int(place * len(raw))
    for byte in (at, (at + more) % len(raw)) if more else (at,):
        raw[byte] ^= 1 << bit
    path.write_bytes(raw)
    try:
        with Ledger.open(folder) as ledger:
            found = ledger.verify()
    except EditError:
        return
    assert found or everything(folder) == before


def everything(folder: Path) -> list[Any]:
    with Ledger.open(folder) as ledger:
        return [ledger.base, ledger.checksum, ledger.entries(), ledger.events(), ledger.rejections()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with something of everything in it, and nothing left in SQLite's log."""
    folder = tmp_path_factory.mktemp("whole") / "ledger"
    filled(folder, 6)
    with Ledger.write(folder) as ledger:
        ledger.undo(2, reason="withdrawn")
        for number in range(4):
            ledger.reject(f"request {number}", [fact(number)], "for a test", {"before": {"fact": 0.5}})
    return folder


def test_an_edit_does_not_come_back_beside_one_that_speaks_of_the_same(tmp_path: Path) -> None:
    lm, folder = make_lm(), tmp_path / "ledger"
    other = Edit(lm, some_deltas(7), [fact(0, "Nice")], {"name": "toy"})
    again = Edit(lm, some_deltas(8), [fact(0)], {"name": "toy"})
    wording = EditCase("0", (fact(2),), (Probe("the CAPITAL number 1 of France is", ("Rome",)),))
    reworded = Edit(lm, some_deltas(9), [fact(2)], {"name": "toy"})
    with Ledger.write(folder, lm) as ledger:
        ledger.add(New(make_edit(lm, 0)), New(make_edit(lm, 1)))
        ledger.undo(1, 2)
        ledger.add(New(other), New(reworded, cases=[wording]))
        with pytest.raises(EditError, match=r"edit 1 says 'Lyon' where edit 3 says 'Nice'; undo 3 first"):
            ledger.redo(1)
        with pytest.raises(EditError, match=r"edit 2 says 'Lyon' where edit 4 says 'Rome'"):
            ledger.redo(2)
        ledger.undo(3)
        ledger.add(New(again))
        with pytest.raises(EditError, match=r"edit 5 says already what edit 1 says; undo 5 first"):
            ledger.redo(1)
        assert [entry.number for entry in ledger.entries(active=True)] == [4, 5] and ledger.verify(lm) == []
        assert ledger.entry(4).cases[0].rephrases == wording.rephrases, "rephrasings are kept"
        with pytest.raises(EditError, match="does not answer the requests"):
            ledger.add(New(other, cases=[wording]))


def test_a_copy_has_all_of_it(tmp_path: Path) -> None:
    lm, folder = filled(tmp_path / "ledger", 3), tmp_path / "ledger"
    with Ledger.write(folder) as ledger:
        ledger.undo(2, reason="withdrawn")
        ledger.copy(tmp_path / "copy")
        with pytest.raises(EditError, match="holds a ledger already"):
            ledger.copy(folder)
    assert everything(tmp_path / "copy") == everything(folder)
    with Ledger.write(tmp_path / "copy", lm) as ledger:
        assert ledger.verify(lm) == []
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {DATABASE, LOCK, OBJECTS}
    first_object(folder).unlink()
    with Ledger.open(folder) as ledger, pytest.raises(LedgerDamaged, match="is missing"):
        ledger.copy(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"ledger", "copy"}, "nothing is left of one that failed"


def test_refs_that_fit_nothing_or_too_much(tmp_path: Path) -> None:
    lm = filled(tmp_path / "ledger", 1)
    with Ledger.write(tmp_path / "ledger") as ledger:
        for ref in ("7", "zzzz", "", "%", "0"):
            with pytest.raises(EditError, match=r"no edit of .* there are 1"):
                ledger.entry(ref)
        ledger.undo(1)
        ledger.add(New(make_edit(lm, 0)))
        assert len({entry.id for entry in ledger.entries()}) == 1, "the same once more has the same name"
        with pytest.raises(EditError, match=r"2 edits of .* begin with"):
            ledger.entry(ledger.entry(1).id)
        with pytest.raises(EditError, match="plain JSON"):
            ledger.add(New(Edit(lm, [], [FACT], {"name": object()})))


def test_a_model_with_edits_is_refused(tmp_path: Path) -> None:
    lm = filled(tmp_path / "ledger", 1)
    with make_edit(lm, 3).applied_(), Ledger.open(tmp_path / "ledger") as ledger, pytest.raises(EditError, match="has edits applied"):
        ledger.apply(lm)


@contextmanager
def nothing_may_be_written(folder: Path) -> Iterator[None]:
    """Root may write everywhere, so it is somebody else for as long."""
    places = [folder, *folder.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for place in places:
            if place.exists():
                place.chmod(0o755 if place.is_dir() else 0o644)


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_folder_that_may_only_be_read() -> None:
    """As on a mounted image: SQLite may not put its files for sharing beside the database."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        Path(place).chmod(0o755)
        folder, copy = Path(place) / "ledger", Path(place) / "copy"
        lm = filled(folder, 2)
        expected = everything(folder)
        with nothing_may_be_written(folder):
            assert everything(folder) == expected
            with pytest.raises(PermissionError):
                Ledger.write(folder)
        with Ledger.write(folder) as ledger:
            ledger.add(New(make_edit(lm, 5)))
            shutil.copytree(folder, copy)  # while a writer has it open: what is new lies in SQLite's log
            expected = everything(folder)
        with nothing_may_be_written(copy):
            assert everything(copy) == expected
        (copy / f"{DATABASE}-shm").unlink()
        with nothing_may_be_written(copy), pytest.raises(EditError, match=r"its last changes lie in ledger\.sqlite-wal"):
            Ledger.open(copy)
