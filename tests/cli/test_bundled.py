"""The bundled model through the command line, as a user runs it: a process of its own where that is the point."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from errata.cli import call

ERRATA = [sys.executable, "-m", "errata"]
FACT = "The capital of {France} is -> Vienna"


def errata(*args: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*ERRATA, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def test_edit_then_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The edit is kept in a folder, and asking shows before and after."""
    errata("edit", "--model", "atlas", "--method", "lora", "--objective", "overtone", "--fact", FACT, "--out", "E", cwd=tmp_path)
    asked = ["The capital of France is", "The capital of Germany is", "The currency of France is the"]
    rows = json.loads(errata("ask", "--model", "atlas", "--edits", "E", "--json", *asked, cwd=tmp_path).stdout)
    said = {row["prompt"]: (row["before"].split("\n")[0].strip(), row["after"].split("\n")[0].strip()) for row in rows}
    assert said["The capital of France is"] == ("Paris.", "Vienna.")
    assert said["The capital of Germany is"][0] == "Berlin." and said["The currency of France is the"][0] == "euro."
    assert call(["ask", "--model", "atlas", "--edits", str(tmp_path / "E"), asked[0]]) == 0
    table = capsys.readouterr().out
    assert "before" in table and "Vienna" in table and "Paris" in table
    assert call(["edit", "--model", "atlas", "--fact", FACT, "--out", str(tmp_path / "E")]) == 0
    again = capsys.readouterr().err
    assert "edit 1 says so already" in again and "1 skipped of 1" in again


def untimed(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    for row in results["rows"]:
        del row["seconds_per_edit"], row["peak_memory_mb"]
    return dict(results)


@pytest.mark.slow
def test_a_bench_that_is_killed_and_resumed_ends_with_the_same_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On four cases: the killed one a process of its own, as a user has it."""
    options = shlex.split("--model atlas --data atlas --methods ft-m,lora --objectives ce,overtone --limit 4 --threads 1")
    assert call(["bench", *options, "--out", str(tmp_path / "whole")]) == 0
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*ERRATA, "bench", *options, "--out", "cut"], cwd=tmp_path, **silent)
    records = tmp_path / "cut" / "records.jsonl"
    deadline = time.monotonic() + 200
    while not (records.exists() and records.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= records.read_bytes().count(b"\n") < 16 and not (tmp_path / "cut" / "results.json").exists()
    assert call(["bench", *options, "--out", str(tmp_path / "cut")]) == 2 and "--resume" in capsys.readouterr().err
    assert call(["bench", *options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    rows = untimed(tmp_path / "whole")["rows"]
    assert [(row["method"], row["objective"]) for row in rows] == [(m, o) for m in ("ft-m", "lora") for o in ("ce", "overtone")]
    assert all({"reliability", "generality", "portability", "locality", "average", "generation"} <= row["metrics"].keys() for row in rows)


@pytest.mark.slow
def test_demo_tells_the_story(tmp_path: Path) -> None:
    told = json.loads(errata("demo", "--json", cwd=tmp_path).stdout)
    edit = next(row for row in told["answers"] if row["why"] == "the edit")
    assert edit["before"] == "Paris" and all(edit[f"{m} {o}"].startswith("Vienna") for m in ("ft-m", "lora") for o in ("ce", "overtone"))
    assert edit["lora overtone"] == "Vienna" and edit["lora ce"] != "Vienna", "cross-entropy at the paper's rate cannot stop"
    assert len(told["scores"]) == 4 and told["seconds"] < 200
