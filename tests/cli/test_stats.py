"""`errata stats` as a user runs it, on a tiny random model in a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import errata
from errata.cli import call
from errata.statistics import Moments, NullSpace, collect
from tests.families import SENTENCES, language_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = language_model("llama")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "[notes].txt"
    path.write_text("\n\n".join(SENTENCES * 3), encoding="utf-8")
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = call(argv)
    out, err = capsys.readouterr()
    return code, out, err


def collected(capsys: pytest.CaptureFixture[str], model: str, text: str, out: Path, *more: str) -> tuple[int, str, str]:
    return said(capsys, "stats", "collect", "--model", model, "--layers", "0,2-3", "--corpus", text, "--out", str(out), *more)


def test_collect_then_show(model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats.safetensors"
    code, printed, err = collected(capsys, model, text, out, "--tokens", "150", "--json")
    assert code == 0, err
    about = {"model": model, "corpus": "[notes].txt", "tokens": 150, "layers": [0, 2, 3], "width": 40}
    assert json.loads(printed) == {"file": str(out), **about} and "stats: 150 of 150" in err
    moments = Moments.load(out)
    moments.check(errata.load(model))

    code, printed, err = said(capsys, "stats", "show", str(out), "--threshold", "0.02,1", "--threshold", "5", "--json")
    assert code == 0, err
    shown = json.loads(printed)
    assert about.items() <= shown.items() and shown["fingerprint"] == moments.fingerprint
    for row in shown["by_layer"]:
        moment = moments.mean(row["layer"])
        values = torch.linalg.eigvalsh(moment)
        assert row["trace"] == pytest.approx(values.sum().item())
        assert row["effective_rank"] == pytest.approx((values.sum() ** 2 / values.square().sum()).item())
        assert [space["threshold"] for space in row["null_space"]] == [0.02, 1.0, 5.0]
        space, own = row["null_space"][1], NullSpace.of(moment, 1.0)
        assert (space["dimensions"], space["share"]) == (own.dimensions, own.share) and space["energy"] == pytest.approx(own.energy)

    code, printed, err = said(capsys, "stats", "show", str(out), "--threshold", "1")
    assert code == 0 and err == "" and "[notes].txt" in printed and "below 1" in printed and "0, 2, 3" in printed
    assert f"{100 * shown['by_layer'][0]['null_space'][1]['share']:.1f} %" in printed
    code, printed, _ = said(capsys, "stats", "show", str(out))
    assert code == 0 and "below" not in printed and "effective rank" in printed


def test_merge(model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether.")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for source, file in zip((text, str(other)), files, strict=True):
        assert collected(capsys, model, source, file)[0] == 0
    out = tmp_path / "both.safetensors"
    code, printed, err = said(capsys, "stats", "merge", *map(str, files), "--out", str(out), "--json")
    assert code == 0, err
    a, b = map(Moments.load, files)
    assert json.loads(printed)["tokens"] == a.count + b.count and json.loads(printed)["corpus"] == "[notes].txt + other.txt"
    assert torch.equal(Moments.load(out).sums[2], a.sums[2] + b.sums[2])
    for argv, message in (
        ([str(files[0])], "at least two"),
        ([str(files[0]), str(files[0]), "--out", str(tmp_path / "twice.safetensors")], "count twice"),
        ([*map(str, files), "--out", str(out)], "exists already"),
        ([str(files[0]), str(tmp_path / "none"), "--out", str(tmp_path / "new.safetensors")], "there is no file"),
        ([str(files[0]), str(other), "--out", str(tmp_path / "new.safetensors")], "damaged"),
    ):
        out_option = [] if "--out" in argv else ["--out", str(tmp_path / "new.safetensors")]
        code, printed, err = said(capsys, "stats", "merge", *argv, *out_option)
        assert (code, printed) == (2, "") and message in err


def test_stopped_and_resumed(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "stats.safetensors"
    assert collected(capsys, model, text, whole, "--tokens", "400", "--batch-size", "1")[0] == 0
    monkeypatch.setattr("errata.statistics.collect", partial(collect, every=0.0))  # the state is written after every chunk
    chunks = iter(range(99))

    def stop(_: object) -> None:
        if next(chunks) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("errata.statistics.stream.Running.check_finite", stop)
        assert collected(capsys, model, text, out, "--tokens", "400", "--batch-size", "1")[0] == 130
    assert not out.exists() and out.with_name(f"{out.name}.part").exists()
    code, _, err = collected(capsys, model, text, out, "--tokens", "400", "--batch-size", "1")
    assert code == 2 and "--resume" in err
    code, _, err = collected(capsys, model, text, out, "--tokens", "300", "--batch-size", "1", "--resume")
    assert code == 2 and "tokens was 400 and is now 300" in err
    code, _, err = collected(capsys, model, text, out, "--tokens", "400", "--batch-size", "1", "--resume")
    assert code == 0, err
    assert all(torch.equal(Moments.load(whole).sums[i], Moments.load(out).sums[i]) for i in (0, 2, 3))
    assert collected(capsys, model, text, out, "--tokens", "400", "--batch-size", "1", "--resume")[0] == 0


def test_too_little_text_is_said(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("A few words.")
    code, _, err = collected(capsys, model, str(tmp_path / "a.txt"), tmp_path / "stats.safetensors")
    assert code == 0 and "say nothing about some of the 40 dimensions" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,x", "--out", "F.safetensors"], "--layers must be numbers"),
        (["--layers", "3-1", "--out", "F.safetensors"], "--layers must be numbers"),
        (["--layers", "9", "--out", "F.safetensors", "--corpus", "bundled"], "layers 0 to 3"),
        (["--layers", "0", "--out", "F.safetensors", "--corpus", "nowhere.txt"], "there is no file or folder 'nowhere.txt'"),
        (["--layers", "0", "--out", "F"], "must end in .safetensors"),
        (["--out", "F.safetensors"], "--layers"),
    ],
)
def test_mistakes_write_nothing(
    options: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, "stats", "collect", "--model", model, *options)
    assert (code, out) == (2, "") and message in err and not list(tmp_path.iterdir())


def test_show_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "stats", "show", str(tmp_path / "none"))
    assert code == 2 and "there is no file" in err
    code, _, err = said(capsys, "stats", "show", str(tmp_path / "none"), "--threshold", "low")
    assert code == 2 and "--threshold must be numbers" in err
