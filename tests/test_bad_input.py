"""What is wrong is said in one line, with what to do, by the right exit code (2: another request is the way out; 1: it failed on the
way), and nothing is half written: what was there is there as before, and nothing else is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import errata
from errata.cli import call
from errata.edits import EditError, Stack
from errata.edits.ledger import DATABASE, SCHEMA, Ledger
from errata.facts import FactError
from errata.lm import ModelError
from tests.families import language_model
from tests.methods.test_contract import FACT, method

LINE = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
WEIGHTS = "tiny/model.safetensors"
EDIT = ["edit", "--model", "tiny", "--no-gate", "--set", "ft-m.steps=2"]
ONE = ["--fact", "The capital of {Spain} is -> Lyon"]


@dataclass(frozen=True)
class Bad:
    """A request, and what it is told.

    before: what is done to the folder first. patch: what is done to the machine. writes: what may be there afterwards that was not before.
    """

    name: str
    argv: list[str]
    says: str
    code: int = 2
    before: Callable[[Path], None] = lambda _: None
    writes: tuple[str, ...] = ()
    patch: Callable[[pytest.MonkeyPatch], None] = field(default=lambda _: None)


def lines(*records: Any) -> Callable[[Path], None]:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    return lambda here: (here / "f.jsonl").write_text(text) and None


def file(name: str, text: str | bytes = "") -> Callable[[Path], None]:
    def write(here: Path) -> None:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return write


def sql(statement: str) -> Callable[[Path], None]:
    def run(here: Path) -> None:
        connection = sqlite3.connect(here / "L" / DATABASE)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return run


def an_object(here: Path) -> Path:
    return min((here / "L" / "objects").glob("*/*"))


def flipped(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def config(**changes: Any) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        path = here / "tiny" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def other_weights(here: Path) -> None:
    tensors = load_file(here / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, here / WEIGHTS, {"format": "pt"})


def full_disk(patch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("errata.disk.to_disk", full)


def full_database(patch: pytest.MonkeyPatch) -> None:
    write = Ledger.write.__func__  # type: ignore[attr-defined]

    def small(cls: Any, *args: Any) -> Any:
        ledger = write(cls, *args)
        (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        return ledger

    patch.setattr(Ledger, "write", classmethod(small))


def read_only(patch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so what the system would say is said for it."""
    patch.setattr("os.access", lambda path, mode, **_: not mode & os.W_OK)


def offloaded(patch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        lm = language_model("llama")
        for name in lm.anatomy.mlp_down:
            lm.model.get_submodule(name).to("meta")
        return lm

    patch.setattr("errata.lm.load", load)


def quantised(patch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        lm = language_model("llama")
        lm.model.is_quantized = True
        return lm

    patch.setattr("errata.lm.load", load)


ASK = ["ask", "--model", "tiny", "Lyon is"]
ASK_L = [*ASK, "--edits", "L"]
GATE = [*EDIT[:3], "--out", "N", *ONE, "--gate", "g.yaml"]
BENCH = ["bench", "--model", "tiny", "--data", "f.jsonl", "--methods", "ft-m", "--out", "R"]
FACTS = [*EDIT, "--out", "N", "--facts", "f.jsonl"]
CASES = [
    # Facts
    Bad("no facts at all", [*EDIT, "--out", "N"], "nothing to edit; give --fact"),
    Bad("a fact without an arrow", [*EDIT, "--out", "N", "--fact", "The capital of {France} is Lyon"], "no '->' in"),
    Bad("an empty target", [*EDIT, "--out", "N", "--fact", "The capital of {France} is -> "], "the target of"),
    Bad("an empty prompt", [*EDIT, "--out", "N", "--fact", " -> Lyon"], "the prompt"),
    Bad("no such file of facts", FACTS, "f.jsonl: No such file or directory"),
    Bad("an empty file of facts", FACTS, "f.jsonl holds no facts", before=file("f.jsonl", "\n\n")),
    Bad("line 512 is broken", FACTS, "f.jsonl, line 512: not valid JSON", before=lines(*[LINE] * 511, '{"prompt": "The')),
    Bad("a line that is no object", FACTS, "f.jsonl, line 2: expected a JSON object, got list", before=lines(LINE, [1])),
    Bad("a line without a target", FACTS, "f.jsonl, line 1: field 'target' is missing", before=lines({"prompt": "a {}", "subject": "b"})),
    Bad("a line with an empty target", FACTS, "f.jsonl, line 1: the target of", before=lines(LINE | {"target": " "})),
    Bad("a slot without a subject", FACTS, "f.jsonl, line 1: the prompt", before=lines({"prompt": "a {} is", "target": "b"})),
    Bad("rephrasings that are no list", FACTS, "line 1: field 'rephrasings' is no list", before=lines(LINE | {"rephrasings": "x"})),
    Bad("a misspelt field", FACTS, "line 1: there is no field 'rephrases'; did you mean", before=lines(LINE | {"rephrases": []})),
    Bad("half a character", FACTS, "line 1: 'Ly\\ud83d' holds '\\ud83d', which is half", before=lines(LINE | {"target": "Ly\ud83d"})),
    Bad("half a character to be asked", FACTS, "line 1: 'Ly\\ud83d' holds", before=lines(LINE | {"locality": ["Ly\ud83d"]})),
    Bad("a share above one", GATE, "g.yaml: locality is a share, at most 1, got 90", before=file("g.yaml", "locality: 90")),
    Bad("half a character in the limits", GATE, "g.yaml: '\\udc00' holds", before=file("g.yaml", 'prompts: ["\\udc00"]')),
    Bad("a file that is no text", FACTS, "f.jsonl", before=file("f.jsonl", b"\xff\xfe\x00\x01\n")),
    Bad("a folder in the place of a file", [*FACTS[:-1], "tiny"], "tiny: Is a directory"),
    Bad(
        "a subject that is not in its prompt", FACTS, "1 of 1 requests rejected", 1, writes=("N",),
        before=lines({"prompt": "The capital of France is", "subject": "Spain", "target": "Lyon"}),
    ),
    Bad(
        "a prompt longer than the model reads", [*EDIT, "--out", "N", "--fact", "Paris " * 200 + "{is} -> Lyon"],
        "1 of 1 requests rejected", 1, writes=("N",),
    ),
    Bad("a contradiction", [*EDIT, "--out", "L", "--fact", "The capital of {France} is -> Rome"], "1 of 1 requests rejected", 1),
    # Parts
    Bad("an unknown command", ["edti", "--model", "tiny"], "No such command 'edti'"),
    Bad("an unknown option", [*EDIT, "--out", "N", *ONE, "--obejctive", "ce"], "--obejctive"),
    Bad("no place", [*EDIT, *ONE], "Missing option '--out'"),
    Bad("an unknown method", [*EDIT[:3], "--out", "N", *ONE, "--method", "mmit"], "did you mean 'memit'"),
    Bad("an unknown objective", [*EDIT, "--out", "N", *ONE, "--objective", "overtune"], "did you mean 'overtone'"),
    Bad("an unknown setting", [*EDIT, "--out", "N", *ONE, "--set", "ft-m.stpes=3"], "did you mean 'steps'"),
    Bad("a setting of another method", [*EDIT, "--out", "N", *ONE, "--set", "lora.lr=1"], "settings for 'lora', which is not used here"),
    Bad("a setting that is no number", [*EDIT[:4], "--out", "N", *ONE, "--set", "ft-m.steps=few"], "ft-m.steps cannot be 'few'"),
    Bad("a setting out of its range", [*EDIT[:4], "--out", "N", *ONE, "--set", "ft-m.steps=0"], "steps must be at least 1"),
    Bad("a layer that is not there", [*EDIT, "--out", "N", *ONE, "--set", "ft-m.layer=40"], "layer"),
    Bad("an objective for nothing", [*EDIT[:3], "--out", "N", *ONE, "--method", "retrieval", "--objective", "overtone"], "retrieval"),
    Bad("two kinds of gate", [*EDIT, "--out", "N", *ONE, "--gate", "g.yaml"], "--gate and --no-gate contradict each other"),
    Bad("an unknown limit", GATE, "there is no limit 'fats'", before=file("g.yaml", "fats: 1")),
    Bad("a file of limits that is not there", GATE, "g.yaml: No such file"),
    Bad("a batch of none", [*EDIT, "--out", "N", *ONE, "--batch", "0"], "--batch"),
    Bad("an unknown data set", ["eval", "--model", "tiny", "--data", "zsrre"], "did you mean 'zsre'"),
    Bad("a sequence longer than its data", [*BENCH, "--protocol", "sequential:9"], "needs as many cases", before=lines(LINE)),
    Bad("an unknown protocol", [*BENCH, "--protocol", "paralel"], "unknown protocol 'paralel'", before=lines(LINE)),
    # Models
    Bad("no such model", ["ask", "--model", "./tniy", "Lyon is"], "tniy"),
    Bad("a folder without a model", ["ask", "--model", "L", "Lyon is"], "the folder L holds no config.json"),
    Bad("an adapter, no model", ["ask", "--model", "A", "Lyon is"], "is a PEFT adapter", before=file("A/adapter_config.json", "{}")),
    Bad("an encoder-decoder", ASK, "encoder-decoder", before=config(model_type="t5", is_encoder_decoder=True)),
    Bad("weights that are missing", ASK, "tiny", before=lambda here: (here / WEIGHTS).unlink()),
    Bad("weights cut off", ASK, "tiny", before=lambda here: os.truncate(here / WEIGHTS, 5000)),
    Bad("no such dtype", [*EDIT, "--out", "N", *ONE, "--dtype", "float23"], "float23"),
    Bad("no such device", [*EDIT, "--out", "N", *ONE, "--device", "cuda:99"], "cuda:99"),
    Bad("offloaded weights", [*EDIT, "--out", "N", *ONE], "is offloaded (on the meta device), where writing does nothing", patch=offloaded),
    Bad("quantised weights", [*EDIT, "--out", "N", *ONE], "is quantised, its weights cannot be added to", patch=quantised),
    # Ledgers
    Bad("a folder of something else", [*EDIT, "--out", "tiny", *ONE], "tiny exists already and is no ledger"),
    Bad("a file, no ledger", [*EDIT, "--out", "f.jsonl", *ONE], "f.jsonl exists already and is no ledger", before=lines(LINE)),
    Bad("no ledger", ["log", "N"], "N holds no ledger; give the folder that 'errata edit --out' wrote"),
    Bad("no ledger to change", ["undo", "tiny", "1"], "tiny holds no ledger"),
    Bad("a database that is gone", ["verify", "L"], "L is damaged in 1 place", 1, before=lambda here: (here / "L" / DATABASE).unlink()),
    Bad("a seed that is too long", [*EDIT, "--out", "N", *ONE, "--seed", "9" * 20], "--seed"),
    Bad("a note that is no text", [*EDIT, "--out", "N", *ONE, "--note", "caf\udce9"], "'caf\\udce9' holds"),
    Bad("a reason that is no text", ["undo", "L", "1", "--reason", "\udce9"], "is half a character"),
    Bad("limits without any text", GATE, "e.txt holds no text to measure perplexity on", writes=("N",),
        before=lambda here: [file(name, text)(here) for name, text in (("g.yaml", "text: e.txt"), ("e.txt", "\n\n"))].clear()),
    Bad("no such edit", ["show", "L", "9"], "no edit of L has the number or begins with '9'; there are 2, numbered from 1"),
    Bad("an edit that is undone twice", ["undo", "L", "1", "2", "1", "7"], "no edit of L has the number or begins with '7'"),
    Bad("an edit that is active already", ["redo", "L", "1"], "edit 1 of L is active already; nothing was changed"),
    Bad("an edit beside one that says otherwise", ["redo", "L", "1"], "edit 1 says 'Tokyo' where edit 3 says 'Rome'; undo 3 first",
        before=lambda here: call([*EDIT, "--out", "L", "--replace", "--fact", "The capital of {France} is -> Rome"]) and None),
    Bad("edits that are not there", ["ask", "--model", "tiny", "--edits", "N", "Lyon is"], "no folder N"),
    Bad("a folder without edits", ["ask", "--model", "tiny", "--edits", "tiny", "Lyon is"], "tiny holds no edits"),
    Bad("another base model", [*EDIT, "--out", "L", *ONE], "tiny' (float32", before=other_weights),
    Bad("another base model, asked", ASK_L, "the ledger L is about", before=other_weights),
    Bad("another dtype", ["ask", "--model", "tiny", "--dtype", "bfloat16", "--edits", "L", "Lyon is"], "load that model in that dtype"),
    Bad("a newer schema", [*EDIT, "--out", "L", *ONE], "install a newer errata", before=sql(f"PRAGMA user_version = {len(SCHEMA) + 1}")),
    Bad("a database that is none", ["log", "L"], "is not a database", 1, before=file(f"L/{DATABASE}", "SQLite? No. " * 100)),
    Bad("a row that was changed", ["log", "L"], "the row of edit 1 in", 1, before=sql("UPDATE edits SET seed = 5 WHERE number = 1")),
    Bad("a tensor that was changed", ASK_L, "damaged", 1, before=lambda here: flipped(an_object(here))),
    Bad("a tensor that is missing", ASK_L, "missing", 1, before=lambda here: an_object(here).unlink()),
    Bad("damage found by verify", ["verify", "L"], "L is damaged in 1 place", 1, before=lambda here: flipped(an_object(here))),
    Bad("no place for tensors", [*EDIT, "--out", "L", *ONE], "No space left on device", 1, patch=full_disk),
    Bad("no place for the row", [*EDIT, "--out", "L", *ONE, "--note", "x" * 9000], "No space left on device", 1, patch=full_database),
    Bad("a folder that may not be written", [*EDIT, "--out", "N", *ONE], "nothing may be written here", 1, patch=read_only),
    # Export
    Bad("an unknown form", ["export", "L", "--to", "X", "--format", "adaptor"], "did you mean 'adapter'"),
    Bad("a place that is taken", ["export", "L", "--to", "tiny"], "tiny exists already"),
    Bad("no edits to export", ["export", "N", "--to", "X"], "no folder N"),
    Bad("damaged edits", ["export", "L", "--to", "X"], "damaged", 1, before=lambda here: flipped(an_object(here))),
    Bad("no place for an export", ["export", "L", "--to", "X", "--format", "checkpoint"], "No space left on device", 1, patch=lambda patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_, **__: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))),
]  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, "tiny", and a ledger of two edits of it, "L"."""
    place = tmp_path_factory.mktemp("template")
    lm = language_model("llama")
    lm.model.save_pretrained(place / "tiny")
    lm.tokenizer.save_pretrained(place / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        wanted = ["--fact", "The capital of {France} is -> Tokyo", "--fact", "{Marie Curie} was born in -> Lyon"]
        assert call([*EDIT, "--out", "L", *wanted]) == 0
    return place


def contents(here: Path) -> dict[str, Any]:
    """Every file, and of a ledger what it says: SQLite's own files are rearranged when it is opened."""
    found: dict[str, Any] = {}
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        if path.is_file() and not name.startswith("L/ledger."):
            found[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "an empty folder"
    try:
        with Ledger.open(here / "L") as ledger:
            found["L"] = [ledger.checksum, [entry.id for entry in ledger.entries()], ledger.events()]
    except EditError as error:
        found["L"] = str(error)
    return found


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_it_says_so_and_changes_nothing(
    bad: Bad, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(template, here)
    monkeypatch.chdir(here)
    bad.before(here)
    before = contents(here)
    with monkeypatch.context() as patch:
        bad.patch(patch)
        code = call(bad.argv)
    err = capsys.readouterr().err
    assert "Traceback" not in err and "ERRATA_DEBUG" not in err, err
    *_, last = err.splitlines()
    assert last.startswith("error: ") and bad.says in last, err
    assert code == bad.code, err
    after = contents(here)
    assert {name: after[name] for name in before} == before
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == set(bad.writes)


def test_there_are_enough() -> None:
    assert len(CASES) >= 40 and len({bad.name for bad in CASES}) == len(CASES)


API: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "an unknown method": (lambda _: errata.methods.get("mmit"), ValueError, "did you mean 'memit'"),
    "an unknown objective": (lambda _: errata.objectives.get("overtune"), ValueError, "did you mean 'overtone'"),
    "a setting out of its range": (lambda _: errata.LoRA(rank=0), ValueError, "rank"),
    "a subject that is not there": (lambda _: errata.Fact("France is", "Spain", "x").subject_span, FactError, "does not occur"),
    "an empty target": (lambda _: errata.Fact("France is", "", " "), FactError, "is empty; write the new answer"),
    "nothing to load": (lambda _: errata.load(), EditError, "there is nothing to load"),
    "no such model": (lambda here: errata.load(here / "none"), ModelError, "none"),
    "edits that are not there": (lambda here: errata.load(here / "tiny", edits=here / "none"), EditError, "holds no edits"),
    "edits of another model": (
        lambda here: errata.load(here / "tiny", dtype="bfloat16", edits=here / "L"), EditError, "is about the model",
    ),
    "nothing to edit": (lambda here: errata.edit(errata.load(here / "tiny"), []), ValueError, "fact"),
    "offloaded weights": (lambda _: method("ft-m").start(meta()), ModelError, "is offloaded"),
    "a ledger for two": (lambda here: (Ledger.write(here / "L"), Ledger.write(here / "L")), EditError, "another process is writing"),
    "a model's name for a model": (lambda here: Ledger.write(here / "N", "tiny"), EditError, "load it first"),  # type: ignore[arg-type]
    "edits in a file": (lambda here: errata.EditedModel.from_pretrained(here / "L" / DATABASE), EditError, "holds no edits"),
    "a ledger that is read": (lambda here: Ledger.open(here / "L").undo(1), EditError, "was opened to be read"),
    "a ledger of another model": (
        lambda here: Ledger.write(here / "L", language_model("llama", seed=1)), EditError, "is about the model",
    ),
    "a model with edits": (lambda here: twice(here), EditError, "has edits applied; revert them first"),
    "nothing to export": (lambda _: errata.EditedModel(errata.load("tiny"), []).save_pretrained("X", "adapter"), EditError, "no edit"),
    "an unknown form": (lambda _: errata.EditedModel.from_pretrained("L").save_pretrained("X", "gguf"), EditError, "'gguf'"),
    "a place that is taken": (lambda _: errata.EditedModel.from_pretrained("L").save_pretrained("L"), EditError, "already"),
    "an edit that is applied twice": (lambda here: [edit.apply() for edit in [one_edit(here)] * 2], EditError, "is applied already"),
    "an edit that is not applied": (lambda here: one_edit(here).revert(), EditError, "is not applied"),
}  # fmt: skip


def meta() -> Any:
    lm = language_model("llama")
    for name in lm.anatomy.mlp_down:
        lm.model.get_submodule(name).to("meta")
    return lm


def twice(here: Path) -> None:
    lm = errata.load(here / "tiny", edits=here / "L")
    with Ledger.open(here / "L") as ledger:
        ledger.apply(lm)


def one_edit(here: Path) -> Any:
    return method("ft-m", steps=2).start(errata.load(here / "tiny")).edit([FACT])


@pytest.mark.parametrize("name", API)
def test_so_does_the_library(name: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, (act, kind, says) = tmp_path / "here", API[name]
    shutil.copytree(template, here)
    monkeypatch.chdir(here)
    before = contents(here)
    with pytest.raises(kind) as error:
        act(here)
    assert says in str(error.value) and contents(here) == before


def test_what_fails_on_the_way_keeps_what_was_done(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second edit: the first one is kept, the model is as it was, and the same call goes on."""
    lm = errata.load(template / "tiny")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    cases = [errata.EditCase(str(i), (errata.Fact.parse(fact),)) for i, fact in enumerate((ONE[1], "{Lyon} lies in -> Spain"))]
    put, done = errata.edits.objects.Objects.put, []

    def second(self: Any, tensors: Any) -> str:
        done.append(1)
        if len(done) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return str(put(self, tensors))

    with Ledger.write(tmp_path / "N", lm) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr("errata.edits.objects.Objects.put", second)
            with pytest.raises(OSError, match="No space left"):
                errata.correct(lm, ledger, cases, method("ft-m", steps=2))
        assert [entry.number for entry in ledger.entries()] == [1] and ledger.verify(lm) == []
        assert not Stack.of(lm).active and all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
        assert [one.status for one in errata.correct(lm, ledger, cases, method("ft-m", steps=2))] == ["skipped", "made"]
