"""The commands as a user runs them, on a tiny random model in a folder: it knows nothing, but everything has to flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.cli import call
from tests.families import language_model

FACT = "The capital of {France} is -> Tokyo"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = language_model("llama")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    facts = [{"prompt": "The capital of {} is", "subject": name, "target": "Warsaw"} for name in ("France", "Japan", "Russia")]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = call(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_ask(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "ask", "--model", model, PROMPT, "Lyon lies in", "--max-new-tokens", "3", "--json")
    assert code == 0, err
    assert [set(row) for row in json.loads(out)] == [{"prompt", "before"}] * 2
    code, out, _ = said(capsys, "ask", "--model", model, PROMPT)
    assert code == 0 and PROMPT in out


@pytest.mark.parametrize("method", ["ft-m", "lora"])
def test_edit_then_ask(method: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "edits")
    options = ["--method", method, "--objective", "overtone", "--fact", FACT, "--out", out, "--set", f"{method}.lr=0.01", "--no-gate"]
    code, made, err = said(capsys, "edit", "--model", model, *options, "--json")
    assert code == 0, err
    result = json.loads(made)
    assert result["facts"][0]["fact"] == FACT and result["method"]["lr"] == 0.01 and result["objective"]["name"] == "overtone"
    code, asked, err = said(capsys, "ask", "--model", model, "--edits", out, PROMPT, "--json")
    assert code == 0, err
    row = json.loads(asked)[0]
    assert (row["before"], row["after"]) == (result["facts"][0]["before"], result["facts"][0]["after"])
    assert row["after"] != row["before"]
    code, again, err = said(capsys, "edit", "--model", model, *options, "--json")
    assert code == 0, err
    assert json.loads(again)["counts"] == {"made": 0, "skipped": 1, "rejected": 0} and json.loads(again)["checksum"] == result["checksum"]


@pytest.mark.parametrize("method", ["ft-m", "rome"])
def test_edit_and_explain(method: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--set", f"{method}.steps=5", *(["--set", "rome.whiten=false", "--set", "rome.prefixes=0"] if method == "rome" else [])]
    argv = ["edit", "--model", model, "--method", method, "--fact", FACT, *quick, "--no-gate", "--explain"]
    argv += ["--rephrase", "France has the capital"]
    code, out, err = said(capsys, *argv, "--out", str(tmp_path / "a"), "--json")
    assert code == 0, err
    told = json.loads(out)["explain"]
    edit, other = told["strips"]
    assert (edit["prompt"], other["prompt"], edit["answer"]) == (PROMPT, "France has the capital", "Tokyo")
    steps = json.loads(out)["diagnostics"]["steps"] if method == "ft-m" else 1
    assert (told["watched"], told["steps"]) == ((True, steps) if method == "ft-m" else (False, None))
    assert len(edit["loss"]) == steps + 1 and edit["ud"][0][0] == pytest.approx(edit["own"][0] + edit["loss"][0][0], rel=1e-2)
    code, out, err = said(capsys, *argv, "--out", str(tmp_path / "b"))
    assert code == 0, err
    assert ("step 0" in out if method == "ft-m" else "before  " in out) and "rephrased: France has the capital" in out
    assert f"u{edit['loss'][0][0]:.2f}" in out, "the letter and the number are there without colour"
    assert "over-fitted" in out and "UD" in out
    code, _, err = said(capsys, *argv, "--fact", "{Spain} lies in -> Lyon", "--out", str(tmp_path / "c"))
    assert code == 2 and "--rephrase belongs to one --fact" in err and not (tmp_path / "c").exists()


def test_bench_and_resume(model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = [
        "bench",
        "--model",
        model,
        "--data",
        data,
        "--methods",
        "ft-m",
        "--objectives",
        "ce,overtone",
        "--limit",
        "2",
        "--out",
        str(out),
    ]
    argv += ["--set", "ft-m.steps=3"]
    code, printed, err = said(capsys, *argv, "--json")
    assert code == 0, err
    results = json.loads(printed)
    assert results == json.loads((out / "results.json").read_text())
    assert [(row["method"], row["objective"], row["n"], row["protocol"]) for row in results["rows"]] == [
        ("ft-m", "ce", 2, "single"),
        ("ft-m", "overtone", 2, "single"),
    ]
    assert results["rows"][0]["settings"]["method"]["steps"] == 3
    assert results["environment"]["data_file"] == "facts.jsonl" and len(results["environment"]["data_file_sha256"]) == 64
    code, _, err = said(capsys, *argv)
    assert code == 2 and "--resume" in err
    (out / "results.json").unlink()
    code, printed, err = said(capsys, *argv, "--resume")
    assert code == 0, err
    assert "ft-m" in printed and "Rel" in printed and json.loads((out / "results.json").read_text()) == results
    code, printed, err = said(capsys, "bench", str(out / "plan.yaml"), "--out", str(out), "--resume", "--json")
    assert code == 0 and json.loads(printed) == results, "plan.yaml is a plan"


def test_bench_of_sequences(model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = ["bench", "--model", model, "--data", data, "--methods", "ft-m,ft-m@steps=1", "--out", str(out), "--seed", "0,1"]
    argv += ["--protocol", "sequential:3", "--checkpoints", "1,2", "--measure", "both", "--transcript", PROMPT]
    argv += ["--set", "ft-m.steps=3", "--set", "ft-m@steps=1.steps=1"]
    code, printed, err = said(capsys, *argv, "--json")
    assert code == 0, err
    results = json.loads(printed)
    assert [(row["method"], row["seed"], row["n"]) for row in results["rows"]] == [
        ("ft-m", 0, 3),
        ("ft-m@steps=1", 0, 3),
        ("ft-m", 1, 3),
        ("ft-m@steps=1", 1, 3),
    ]
    assert [mark["edits"] for mark in results["rows"][0]["metrics"]["checkpoints"]] == [1, 2, 3]
    assert results["rows"][0]["transcripts"][0]["prompt"] == PROMPT
    code, printed, err = said(capsys, *argv, "--resume")
    assert code == 0 and "Eff↑" in printed and "noise" in printed and "sequential:3" in printed, err
    code, printed, err = said(capsys, "bench", str(out / "plan.yaml"), "--out", str(out), "--resume", "--json")
    assert code == 0 and json.loads(printed) == results, "plan.yaml is a plan"
    code, _, err = said(capsys, *argv[:-4], "--checkpoints", "two")
    assert code == 2 and "--checkpoints must be whole numbers" in err
    code, _, err = said(capsys, "bench", "--model", model, "--data", data, "--methods", "ft-m", "--protocol", "sequential:4")
    assert code == 2 and "a sequence of 4 needs as many cases" in err


def test_runs_without_a_name_get_folders_of_their_own(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, _, err = said(capsys, "bench", "--model", model, "--data", data, "--methods", "ft-m", "--limit", "1", "--set", "ft-m.steps=1")
        assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-facts", "tiny-facts-2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ftm"], "ftm"),
        (["--methods", "ft-m", "--objectives", "overtones"], "overtones"),
        (["--methods", "ft-m", "--set", "ft-m.learning_rate=1"], "ft-m has no setting 'learning_rate'"),
        (["--methods", "ft-m", "--set", "ft-m.steps=many"], "ft-m.steps cannot be 'many'"),
    ],
)
def test_unknown_parts_are_refused_before_anything_is_written(
    options: list[str], message: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, "bench", "--model", model, "--data", data, *options, "--out", str(tmp_path / "run"))
    assert (code, out) == (2, "") and message in err and not (tmp_path / "run").exists()


def test_eval_on_other_data(model: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "eval", "--model", model, "--data", data, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["n"] == 3 and result["metrics"]["reliability"] is not None and result["metrics"]["locality"] is None
    code, out, _ = said(capsys, "eval", "--model", model, "--data", data)
    assert code == 0 and "reliability" in out


def test_no_such_model(capsys: pytest.CaptureFixture[str], data: str) -> None:
    code, out, err = said(capsys, "ask", "--model", "./no-such-model", PROMPT)
    assert (code, out) == (2, "") and "no-such-model" in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("kind", ["methods", "objectives"])
def test_lists(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "list", kind, "--json")
    assert code == 0, err
    names = {row["name"] for row in json.loads(out)}
    assert names >= {"methods": {"ft-m", "ft-l", "lora"}, "objectives": {"ce", "overtone"}}[kind]
    assert all(row["what"] for row in json.loads(out))
