"""Requests that are wrong, and answers that need no model: at once, one line, the right exit code, nothing on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from errata.cli import call

BENCH = ["bench", "--model", "atlas", "--data", "atlas", "--methods", "ft-m"]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = call(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bnech"], "No such command"),
        (["bench", "--modle", "atlas"], "--model"),
        (["bench", "--model", "atlas", "--data", "atlas"], "'methods' is missing"),
        ([*BENCH, "--protocol", "parallel"], "unknown protocol 'parallel'"),
        ([*BENCH, "--limit", "0"], "--limit"),
        ([*BENCH, "--seed", "one"], "--seed must be whole numbers"),
        ([*BENCH, "--set", "lr=1"], "write it as method.name=value"),
        ([*BENCH, "--set", "lora.lr=1"], "settings for 'lora', which is not used here"),
        ([*BENCH, "--resume"], "--resume needs --out"),
        (["bench", "no-such-plan.yaml"], "no-such-plan.yaml: No such file"),
        (["edit", "--model", "atlas", "--out", "E"], "nothing to edit"),
        (["edit", "--model", "atlas", "--out", "E", "--fact", "The capital of {France} is Lyon"], "no '->' in"),
        (["edit", "--model", "atlas", "--out", "E", "--facts", "none.jsonl"], "none.jsonl: No such file"),
        (["edit", "--model", "atlas", "--fact", "a -> b"], "--out"),
        (["ask", "--model", "atlas"], "PROMPT"),
        (["ask", "--model", "atlas", "--edits", "no-such-folder", "Hello"], "no folder no-such-folder"),
        (["eval", "--model", "atlas", "--data", "zsrre"], "did you mean 'zsre'"),
        (["eval", "--model", "atlas", "--data", "missing.json"], "no such data file: missing.json"),
        (["eval", "--model", "atlas", "--data", "atlas", "--split", "tets"], "did you mean 'test'"),
        (["edit", "--model", "atlas", "--out", "E", "--fact", "a -> b", "--set", "lora.lr=1"], "settings for 'lora'"),
        (["edit", "--model", "atlas", "--out", "E", "--fact", "a -> b", "--set", "ft-m.steps=0"], "steps must be at least 1"),
        (["edit", "--model", "atlas", "--out", "E", "--fact", "a -> b", "--set", "ft-m.variant=l"], "no setting 'variant'"),
        (["list", "animals"], "animals"),
    ],
)
def test_a_wrong_request(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir()), "a wrong request leaves nothing behind"


def test_a_run_that_is_there_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from errata.bench.folder import start
    from errata.bench.plan import Plan

    start(Plan(model="atlas", data="atlas", methods=("ft-m",), split="test"), tmp_path / "run")
    code, _, err = said(capsys, *BENCH, "--out", str(tmp_path / "run"))
    assert code == 2 and "--resume" in err
    code, _, err = said(capsys, *BENCH, "--limit", "7", "--out", str(tmp_path / "run"), "--resume")
    assert code == 2 and "limit was None and is now 7" in err


def test_a_folder_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    code, _, err = said(capsys, "edit", "--model", "atlas", "--fact", "a -> b", "--out", str(tmp_path))
    assert code == 2 and "exists already and is no ledger" in err and [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("kind", ["data", "models"])
def test_lists(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "list", kind, "--json")
    listed = json.loads(out)
    assert code == 0 and err == "" and "atlas" in {row["name"] for row in listed}
    code, out, _ = said(capsys, "list", kind)
    assert code == 0 and all(row["name"] in out for row in listed)


def test_the_installed_command_and_its_exit_code() -> None:
    command = Path(sys.executable).with_name("errata")
    if not command.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([command, "edit", "--model", "atlas", "--out", "E"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nothing to edit")
    assert subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60).stdout.startswith("errata 0.")


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.facts import FactError

    monkeypatch.setenv("ERRATA_DEBUG", "1")
    with pytest.raises(FactError):
        call(["edit", "--model", "atlas", "--out", "E", "--fact", "nothing"])
