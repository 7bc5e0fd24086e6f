"""`errata edit`, then `log`, `show`, `undo`, `redo`, `verify`, `diff`, `export`, `ask`: the life of a ledger, as a user leads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errata.cli import call
from tests.families import language_model

FACTS = ("The capital of {France} is -> Tokyo", "The capital of {Japan} is -> Lyon", "{Marie Curie} was born in -> Moscow")


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = call([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def told(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Any:
    code, out, err = said(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, "tiny", and a ledger of three edits, "L"."""
    place = tmp_path_factory.mktemp("made")
    lm = language_model("llama")
    lm.model.save_pretrained(place / "tiny")
    lm.tokenizer.save_pretrained(place / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        wanted = [word for fact in FACTS for word in ("--fact", fact)]
        options = ["--method", "lora", "--set", "lora.steps=3", "--no-gate", "--note", "asked for by Ann"]
        assert call(["edit", "--model", "tiny", "--out", "L", *options, *wanted]) == 0
    return place


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def answers(capsys: pytest.CaptureFixture[str], *edits: str) -> list[tuple[str, str]]:
    prompts = ["The capital of France is", "Marie Curie was born in"]
    return [(row["before"], row.get("after", "")) for row in told(capsys, "ask", "--model", "tiny", *edits, *prompts)]


def test_log_and_show(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = told(capsys, "log", "L")
    assert [edit["number"] for edit in listed["edits"]] == [1, 2, 3] and Path(listed["base"]["name"]).name == "tiny"
    assert [edit["facts"][0]["target"] for edit in listed["edits"]] == ["Tokyo", "Lyon", "Moscow"]
    code, out, err = said(capsys, "log", "L")
    assert code == 0 and "asked for by Ann" in out and "3 of 3 active, on " in err and "tiny (float32)" in err
    one = told(capsys, "show", "L", "2")
    assert one == told(capsys, "show", "L", one["id"]) and one["parent"] == 1 and one["built_on_it"] == [3]
    assert one["method"]["name"] == "lora" and one["method"]["steps"] == 3 and one["diagnostics"]["steps"] == 3
    code, out, _ = said(capsys, "show", "L", one["id"][:5])
    assert code == 0 and "The capital of {Japan} is -> Lyon" in out and "made on top of" in out and "steps=3" in out


def test_undo_and_redo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, sums = answers(capsys, "--edits", "L"), told(capsys, "log", "L")["checksum"]
    code, out, err = said(capsys, "undo", "L", "1", "3", "--reason", "was wrong")
    assert code == 0 and out.startswith("undone: 1, 3; 1 active"), err
    assert "1 later edit was computed with them in the weights (2) and stays as it is; --rebase" in err
    code, out, _ = said(capsys, "log", "L")
    assert code == 0 and out.count("undone") == 2
    assert "was wrong" in said(capsys, "show", "L", "1")[1]
    changed = told(capsys, "redo", "L", "3", "1")
    assert changed["redone"] == [3, 1] and changed["checksum"] == sums and answers(capsys, "--edits", "L") == first
    assert told(capsys, "undo", "L", "1", "2", "3")["checksum"] != sums
    assert all(before == after for before, after in answers(capsys, "--edits", "L")), "without edits the model is what it was"


def test_undo_with_rebase(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = told(capsys, "undo", "L", "1", "--rebase", "--no-gate")
    assert (changed["undone"], changed["built_on_them"], changed["made"]) == ([1], [2, 3], [4, 5])
    wanted = [word for fact in FACTS[1:] for word in ("--fact", fact)]
    options = ["--method", "lora", "--set", "lora.steps=3", "--no-gate"]
    never = told(capsys, "edit", "--model", "tiny", "--out", "never", *options, *wanted)
    assert never["checksum"] == changed["checksum"], "as if the first had never been there"
    code, out, _ = said(capsys, "undo", "L", "4", "--rebase", "--no-gate")
    assert code == 0 and "made again without it: 5, now 6" in out
    assert told(capsys, "show", "L", "6")["note"] == "asked for by Ann"
    assert "edit 5, made again without 4" in said(capsys, "show", "L", "6")[1]
    for wrong in (["--no-gate"], ["--rebase", "--no-gate", "--gate", "g.yaml"]):
        assert said(capsys, "undo", "L", "6", *wrong)[0] == 2
    sums = told(capsys, "log", "L")["checksum"]
    said(capsys, "edit", "--model", "tiny", "--out", "L", *options, "--fact", "{Lyon} lies in -> Spain")
    (here / "strict.yaml").write_text("perplexity: 0\n")
    code, _, err = said(capsys, "undo", "L", "6", "--rebase", "--gate", "strict.yaml")
    assert code == 2 and "edit 7 cannot be made again: " in err and "nothing was changed (other limits" in err
    assert told(capsys, "undo", "L", "7")["checksum"] == sums


def test_verify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "verify", "L")
    assert (code, out) == (0, "L: 3 edits, all well\n")
    assert told(capsys, "verify", "L", "--no-model") == {"edits": "L", "problems": []}
    place = next((here / "L" / "objects").glob("*/*"))
    raw = bytearray(place.read_bytes())
    raw[-1] ^= 1
    place.write_bytes(raw)
    code, out, err = said(capsys, "verify", "L")
    assert (
        code == 1 and "its SHA-256 is not its name" in out and err.endswith("error: L is damaged in 1 place; put it back from a backup\n")
    )
    place.unlink()
    code, out, _ = said(capsys, "verify", "L", "--no-model", "--json")
    assert code == 1 and "is missing" in json.loads(out)["problems"][0]
    (here / "L" / "ledger.sqlite").write_bytes(b"SQLite? No. " * 100)
    code, out, _ = said(capsys, "verify", "L", "--json")
    assert code == 1 and "not a database" in json.loads(out)["problems"][0]


def test_what_looks_like_markup_is_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--no-gate", "--set", "ft-m.steps=1", "--note", "[ticket 7] by [/b]", "--fact", "The [/b] of {Spain} is -> [x]"]
    assert said(capsys, "edit", "--model", "tiny", "--out", "L", *wanted)[0] == 0
    code, out, _ = said(capsys, "log", "L")
    assert code == 0 and "[ticket 7] by [/b]" in out and "[/b]" in out
    assert "[/b]" in said(capsys, "diff", "L", "1", "4")[1]


def test_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "diff", "L", "1", "2")
    assert found["settings"]["facts"] == [FACTS[0], FACTS[1]] and "seed" not in found["settings"]
    assert all(one["a"] > 0 and one["b"] > 0 and -1 <= one["cosine"] <= 1 for one in found["matrices"].values())
    same = told(capsys, "diff", "L", "1", "1")
    assert same["settings"] == {} and all(one["cosine"] == pytest.approx(1) for one in same["matrices"].values())
    assert (
        said(capsys, "edit", "--model", "tiny", "--out", "L", "--set", "ft-m.layer=2", "--no-gate", "--fact", "{Lyon} lies in -> Spain")[0]
        == 0
    )
    other = told(capsys, "diff", "L", "1", "4")
    assert other["settings"]["method"] == ["lora", "ft-m"]
    assert any(one["a"] is None and one["cosine"] is None for one in other["matrices"].values())
    code, out, _ = said(capsys, "diff", "L", "1", "4")
    assert code == 0 and "cosine" in out and "–" in out


def test_rejected(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default limits on a model that knows nothing: an edit that tears it apart does not stay."""
    wanted = ["edit", "--model", "tiny", "--out", "L", "--set", "ft-m.lr=1", "--fact", "{Lyon} lies in -> Spain"]
    code, out, err = said(capsys, *wanted, "--json")
    result = json.loads(out)
    assert code == 1 and result["counts"] == {"made": 0, "skipped": 0, "rejected": 1}
    assert "1 of 1 requests rejected; errata log L --rejected says why" in err
    (no,) = told(capsys, "log", "L", "--rejected")
    assert no["facts"] == ["{Lyon} lies in -> Spain"] and no["reason"] == result["outcomes"][0]["reason"]
    assert no["reason"].split()[0] in ("fact", "locality", "perplexity")
    code, out, _ = said(capsys, "log", "L", "--rejected")
    assert code == 0 and "Spain" in out
    (here / "open.yaml").write_text("fact: 0\nlocality: 0\nlocality_drop: 1\nperplexity: 1e12\n".replace("1e12", "1000000000000"))
    code, _, err = said(capsys, *wanted)
    assert code == 1 and "rejected: {Lyon} lies in -> Spain: before: " in err, "it was turned down before"
    assert told(capsys, *wanted, "--gate", "open.yaml")["counts"]["made"] == 1, "under other limits it is another request"


def test_a_thousand_lines_would_look_like_this(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "The river of {} is", "subject": name, "target": "Paris", "locality": ["Lyon lies in"]} for name in ("Spain", "Russia")
    ]
    lines.append(lines[0] | {"target": "Rome"})
    (here / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--facts", "f.jsonl", "--no-gate", "--set", "ft-m.steps=2", "--out", "N"]
    code, out, err = said(capsys, "edit", "--model", "tiny", *options)
    assert code == 1 and "2 made, 1 rejected of 3" in err and "another request says 'Paris' about the same; ask for one of them" in err
    assert "editing: 3 of 3 · 1 rejected" in err and "The river of Russia is" in out
    assert [no["facts"] for no in told(capsys, "log", "N", "--rejected")] == [["The river of {Spain} is -> Rome"]]
    assert said(capsys, "edit", "--model", "tiny", *options)[0] == 1 and len(told(capsys, "log", "N", "--rejected")) == 1
    (here / "f.jsonl").write_text(json.dumps(lines[2]) + "\n")
    code, _, err = said(capsys, "edit", "--model", "tiny", *options)
    assert code == 1 and "edit 1 says 'Paris' about the same; undo it, or replace it" in err
    code, _, err = said(capsys, "edit", "--model", "tiny", *options, "--replace")
    assert code == 0 and "1 made of 1" in err


@pytest.mark.parametrize("format", ["adapter", "checkpoint", "patch"])
def test_export_of_a_ledger(format: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "undo", "L", "2")
    done = told(capsys, "export", "L", "--to", format, "--format", format)
    assert done["modules"] and (here / format / "README.md").is_file()
    card = (here / format / "README.md").read_text()
    assert "Tokyo" in card and "Moscow" in card and "{Japan}" not in card, "what is undone is not shipped"
    if format != "adapter":
        prompt = "The capital of France is"
        (after,) = told(capsys, "ask", "--model", format, prompt)
        assert after["before"] == told(capsys, "ask", "--model", "tiny", "--edits", "L", prompt)[0]["after"]


def test_the_model_need_not_be_named(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` and `export` load the one that the ledger names, wherever they are called from, or with another name for it."""
    edit = ["edit", "--model", "tiny", "--out", "M", "--no-gate", "--set", "ft-m.steps=2", "--fact", "{Lyon} lies in -> Spain"]
    assert said(capsys, *edit)[0] == 0
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    assert said(capsys, "verify", "../M")[:2] == (0, "../M: 1 edit, all well\n")
    monkeypatch.chdir(here)
    (here / "tiny").rename(here / "moved")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # "tiny" could be a model of the hub: no minute of retries
    code, _, err = said(capsys, "verify", "M")
    assert code == 2 and "tiny" in err
    assert said(capsys, "verify", "M", "--model", "moved")[:2] == (0, "M: 1 edit, all well\n")


def test_listing_and_undoing_leave_torch_alone(here: Path) -> None:
    """They take a second in the place of eight."""
    asked = [["log", "L"], ["show", "L", "2"], ["undo", "L", "2"], ["redo", "L", "2"], ["log", "L", "--rejected"]]
    script = f"import sys\nfrom errata.cli import call\nprint([call(one) for one in {asked}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[0, 0, 0, 0, 0] False")


def test_a_narrow_terminal_shows_what_edits_are_found_by(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from errata.cli import call\ncall(['log', 'L'])"],
        cwd=here, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "60", "TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert "active" in done.stdout and "lora" in done.stdout


def test_edits_bring_their_own_dtype(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger made in another type than the checkpoint's is asked and measured in that type, unless told otherwise."""
    options = ["--method", "lora", "--set", "lora.steps=2", "--no-gate", "--dtype", "float64"]
    assert said(capsys, "edit", "--model", "tiny", "--out", "D", *options, "--fact", FACTS[0])[0] == 0
    assert told(capsys, "ask", "--model", "tiny", "--edits", "D", "The capital of France is")[0]["after"]
    (here / "d.jsonl").write_text(json.dumps({"prompt": "The capital of {} is", "subject": "France", "target_new": "Tokyo"}) + "\n")
    assert said(capsys, "eval", "--model", "tiny", "--data", "d.jsonl", "--edits", "D")[0] == 0
