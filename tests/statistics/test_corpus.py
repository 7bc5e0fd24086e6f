"""Where ordinary text comes from."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import errata
from errata.data.atlas.corpus import sample, write_sample
from errata.statistics import StatisticsError, moments_for, texts
from errata.statistics.corpus import LONGEST_PARAGRAPH
from tests.families import language_model

MODEL = Path(str(resources.files("errata") / "data" / "atlas" / "model"))


def test_the_bundled_text_is_what_the_generator_writes(tmp_path: Path) -> None:
    """The text, not the compressed bytes: these depend on the zlib that wrote them."""
    bundled = gzip.decompress((MODEL / "corpus.txt.gz").read_bytes()).decode()
    assert bundled == sample()
    write_sample(tmp_path)
    assert list(texts(tmp_path / "corpus.txt.gz")) == list(texts("bundled"))
    read = list(texts("bundled"))
    assert len(read) >= 1200 and "\n\n".join(read).replace("\n", " ").split() == bundled.split()
    assert " .\n" not in bundled and all("\n\n" not in text for text in read)


@pytest.mark.slow
def test_the_bundled_text_is_long_enough() -> None:
    tokenizer = errata.load("atlas").tokenizer
    assert 60_000 < sum(map(len, tokenizer(list(texts("bundled")))["input_ids"])) < 120_000


def test_files_and_folders(tmp_path: Path) -> None:
    plain = "One line\nand another.\n\n \nA second paragraph.\r\n\r\nThe third, without an end"
    wanted = ["One line\nand another.", "A second paragraph.", "The third, without an end"]
    (tmp_path / "a.txt").write_bytes(plain.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(plain.encode()))
    lines = [json.dumps({"text": text, "id": 1}) for text in ("x\n\ny", "北京")]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    one = texts(str(tmp_path / "a.txt"))
    assert list(one) == wanted == list(one), "every iteration begins anew"
    assert one.name == "a.txt" and one.digest == texts(tmp_path / "b.txt.gz").digest
    assert list(texts(tmp_path / "c.jsonl")) == ["x\n\ny", "北京"]
    whole = texts(tmp_path)
    assert list(whole) == [*wanted, *wanted, "x\n\ny", "北京", "北京"] and str(tmp_path.parent) not in whole.name
    (tmp_path / "a.txt").write_text("changed")
    assert texts(tmp_path).digest != whole.digest and texts(tmp_path / "a.txt").digest != one.digest


def test_long_paragraphs_are_cut_at_white_space(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(2000)]
    (tmp_path / "a.txt").write_text(" ".join(words) + "\n\n" + "x" * (LONGEST_PARAGRAPH + 1))
    read = list(texts(tmp_path / "a.txt"))
    assert max(map(len, read)) <= LONGEST_PARAGRAPH and " ".join(read[:-2]).split() == words
    assert read[-2:] == ["x" * LONGEST_PARAGRAPH, "x"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-file.txt", "there is no file or folder 'no-such-file.txt'"),
        ("./nowhere", "there is no file or folder './nowhere'"),
        ("", "there is no file or folder ''"),
        (Path("nowhere"), "there is no file or folder"),
    ],
)
def test_what_is_not_there(source: str | Path, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        texts(source)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(StatisticsError, match=r"no kind known as text; give one of \.txt"):
        texts(tmp_path / "a.pdf")
    with pytest.raises(StatisticsError, match="holds no text"):
        texts(tmp_path)
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(StatisticsError, match="cannot be read"):
        texts(tmp_path / "a.txt.gz")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(StatisticsError, match=r"b\.jsonl, line 2"):
        list(texts(tmp_path / "b.jsonl"))


def test_a_model_brings_its_own_text(tmp_path: Path) -> None:
    lm = language_model("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    write_sample(tmp_path)
    own = texts(None, errata.load(tmp_path))
    assert own.digest == texts("bundled").digest and own.name.startswith("corpus.txt.gz of ")
    assert texts(None, errata.load("atlas")).digest == own.digest


class Rows(list[dict[str, Any]]):
    def shuffle(self, seed: int, buffer_size: int) -> Rows:
        return self


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A `datasets` of our own: what it was asked, and what it is to give."""
    hub: dict[str, Any] = {"rows": Rows([{"id": "1", "text": "one"}, {"id": "2", "text": "two"}])}

    def load_dataset(*args: Any, **options: Any) -> Rows:
        hub["asked"] = (args, options)
        if isinstance(hub["rows"], Exception):
            raise hub["rows"]
        rows: Rows = hub["rows"]
        return rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def test_data_sets(hub: dict[str, Any]) -> None:
    corpus = texts("wikitext:wikitext-103-raw-v1")
    assert "asked" not in hub, "nothing is opened before it is read"
    assert list(corpus) == ["one", "two"]
    assert hub["asked"] == (("wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})
    hub["rows"] = Rows([{"number": 1, "content": "three"}])
    assert list(texts("plain")) == ["three"] and hub["asked"][0] == ("plain", None)
    for rows, message in (
        (Rows([{"number": 1}]), "no column of text, only number"),
        (Rows(), "is empty"),
        (ConnectionError("no route\nto host"), r"cannot be read \(no route\).*--corpus FILE"),
    ):
        hub["rows"] = rows
        with pytest.raises(StatisticsError, match=message):
            list(texts("plain"))


def test_without_text_of_its_own_wikipedia(hub: dict[str, Any]) -> None:
    lm = language_model("llama")
    assert list(texts(None, lm)) == ["one", "two"]
    assert hub["asked"][0] == ("wikimedia/wikipedia", "20231101.en")
    hub["rows"] = ConnectionError("offline")
    with pytest.raises(StatisticsError, match=r"corpus=FILE, or run: errata stats collect --model llama --corpus FILE"):
        moments_for(lm, [0])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StatisticsError, match=r"pip install 'errata\[datasets\]'.*corpus=FILE"):
        list(texts("wikitext"))
