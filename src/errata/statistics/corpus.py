"""Ordinary text, from wherever it comes: a file, a folder, the bundled world's text, the text beside a model's weights, a data set.

A corpus is opened when it is read and not before, so statistics that are in the cache need neither network nor the `datasets` package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from errata.statistics.errors import StatisticsError

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

BESIDE = "corpus.txt.gz"
"""Any local model folder may bring its own ordinary text under this name."""
BUNDLED = "bundled"
WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
"""What the papers take, in its present edition."""
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
LONGEST_PARAGRAPH = 2000
"""Characters, about 500 tokens: a longer paragraph of a .txt file becomes several texts, cut at white space."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts, in an order that never changes; every iteration begins at the first.

    name: for people; never a path. digest: names the content of a file, and the name and edition of a data set.
    """

    name: str
    digest: str
    open: Callable[[], Iterator[str]] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[str]:
        return self.open()


def texts(source: str | Path | Corpus | None, lm: LanguageModel | None = None) -> Corpus:
    """The corpus that `source` names.

    source: a .txt file (paragraphs, parted by empty lines), a .jsonl file (the field "text" of each line), either of them gzipped, a
        folder of these; "bundled", the text of atlas's world; the name of a data set of `datasets`, "wikitext:wikitext-103-raw-v1",
        whose train split is streamed; or None: the text beside the model's own weights (`corpus.txt.gz` in its folder) if there is
        one, else Wikipedia, as in the papers.
    Raises StatisticsError for a file that is not there or of an unknown kind; for a data set that cannot be had, when it is read.
    """
    if isinstance(source, Corpus):
        return source
    if source is None:
        own = beside(lm)
        name = lm.name if lm is not None else "MODEL"
        return _file(own, f"{BESIDE} of {name}") if own else _data_set(WIKIPEDIA, _nothing_beside(name))
    if source == BUNDLED:
        return _file(_bundled(), "bundled text of atlas")
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir() and text.strip():  # nothing at all would be the present folder
        return _folder(path)
    if path.is_file():
        return _file(path, path.name)
    if isinstance(source, Path) or not text.strip() or text.startswith((".", "~", "/", "\\")) or text.endswith(SUFFIXES):
        raise StatisticsError(f"there is no file or folder {text!r}; give a text file, a folder of them, '{BUNDLED}' or a data set's name")
    return _data_set(text, "no file of that name is here either: give a text file, corpus=FILE or --corpus FILE")


def _bundled() -> Path:
    path = Path(str(resources.files("errata") / "data" / "atlas" / "model" / BESIDE))
    if not path.is_file():
        raise StatisticsError("the bundled text is not in this installation; install errata again, or give a text file of your own")
    return path


def beside(lm: LanguageModel | None) -> Path | None:
    """The text in the folder that the model was loaded from, if it was one and holds one."""
    folder = "" if lm is None else str(getattr(lm.model.config, "_name_or_path", "") or "")
    path = Path(folder) / BESIDE
    return path if folder and path.is_file() else None


def _nothing_beside(name: str) -> str:
    return (
        f"there is no {BESIDE} beside the weights either; collect the statistics of {name} over a text of your own: set the method's "
        f"corpus=FILE, or run: errata stats collect --model {name} --corpus FILE --layers L --out STATS.safetensors"
    )


def _file(path: Path, name: str) -> Corpus:
    if not path.name.endswith(SUFFIXES):
        raise StatisticsError(f"{path} is of no kind known as text; give one of {', '.join(SUFFIXES)}, or a folder of them")
    return Corpus(name, _content(path), lambda: _read(path))


def _folder(folder: Path) -> Corpus:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not paths:
        raise StatisticsError(f"the folder {folder} holds no text; put files of these kinds into it: {', '.join(SUFFIXES)}")
    digest = hashlib.sha256("\n".join(f"{path.relative_to(folder).as_posix()} {_content(path)}" for path in paths).encode()).hexdigest()
    return Corpus(f"{folder.resolve().name}/ ({len(paths)} files)", digest, lambda: chain.from_iterable(map(_read, paths)))


def _content(path: Path) -> str:
    """SHA-256 of what the file says, gzipped or not."""
    try:
        with _open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a gzip file is one
    except (OSError, EOFError) as error:
        raise StatisticsError(f"{path} cannot be read ({error}); give a whole text file") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]  # a gzip file is one


def _read(path: Path) -> Iterator[str]:
    with _open(path) as file:
        lines = (line.decode("utf-8", errors="replace") for line in file)
        yield from _json_lines(lines, path) if path.name.removesuffix(".gz").endswith(".jsonl") else _paragraphs(lines)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """What stands between empty lines, never more than LONGEST_PARAGRAPH characters where there is white space to cut at."""
    kept: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            kept.append(line.rstrip("\r\n"))
        elif kept:
            yield from _pieces("\n".join(kept))
            kept = []


def _pieces(text: str) -> Iterator[str]:
    while len(text) > LONGEST_PARAGRAPH:
        gaps = [match.start() for match in re.finditer(r"\s+", text[: LONGEST_PARAGRAPH + 1])]
        end = gaps[-1] if gaps and gaps[-1] > 0 else LONGEST_PARAGRAPH
        yield text[:end]
        text = text[end:].lstrip()
    if text:
        yield text


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise StatisticsError(
                f'{path}, line {number} is no JSON object with "text" ({error!r}); write {{"text": "…"}} a line'
            ) from error
        yield str(text)


def _data_set(name: str, way_out: str) -> Corpus:
    """A data set of the `datasets` package: "name" or "name:config", its train split, streamed in an order drawn once from a seed."""
    digest = hashlib.sha256(f"datasets {name} train".encode()).hexdigest()
    return Corpus(name, digest, lambda: _stream(name, way_out))


def _stream(name: str, way_out: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise StatisticsError(
            f"the text {name!r} is read with the package 'datasets', which is not installed (pip install 'errata[datasets]'); {way_out}"
        ) from error
    place, _, config = name.partition(":")
    try:  # Wikipedia is ordered by age, so neighbours are alike
        rows = datasets.load_dataset(place, config or None, split="train", streaming=True).shuffle(seed=0, buffer_size=1000)
        stream: Iterator[Any] = iter(rows)
        first = next(stream, None)
    except Exception as error:  # whatever the hub, the network or the file system say
        raise StatisticsError(f"the data set {name!r} cannot be read ({_line(error)}); {way_out}") from error
    if first is None:
        raise StatisticsError(f"the data set {name!r} is empty; {way_out}")
    column = "text" if isinstance(first.get("text"), str) else next((key for key, value in first.items() if isinstance(value, str)), None)
    if column is None:
        raise StatisticsError(f"the data set {name!r} has no column of text, only {', '.join(first)}; {way_out}")
    for row in chain([first], stream):
        yield row[column]


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


__all__ = ["BESIDE", "BUNDLED", "WIKIPEDIA", "Corpus", "beside", "texts"]
