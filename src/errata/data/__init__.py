"""Data sets as cases: `load("zsre")`, `load("my_facts.jsonl")`.

A name stands for a file that the user has downloaded; a path is any .json (an array) or .jsonl (an object a line), and what it holds
is recognised from its first record, not from its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from errata.data import counterfact, jsonl, knowedit, mquake, zsre
from errata.data.fields import DataError, Record
from errata.facts import EditCase, FactError, read_jsonl

__all__ = ["FORMATS", "SETS", "DataError", "Format", "digest", "find", "load", "names", "sniff"]

ENVIRONMENT = "ERRATA_DATA"


@dataclass(frozen=True, slots=True)
class Format:
    """How records of one kind are recognised and read."""

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    cases: Callable[[Sequence[Record]], Iterator[EditCase]]


FORMATS = (
    Format("errata cases", jsonl.recognises, jsonl.cases),
    Format("CounterFact", counterfact.recognises_nested, counterfact.nested_cases),
    Format("MQuAKE", mquake.recognises, mquake.cases),
    Format("CounterFact, flat", counterfact.recognises_flat, counterfact.flat_cases),
    Format("ZsRE, MEND form", zsre.recognises, zsre.cases),
    Format("WikiBio", knowedit.recognises_wikibio, knowedit.wikibio_cases),
    Format("KnowEdit or facts", knowedit.recognises, knowedit.cases),
)
"""Tried in this order; the first that recognises a file's first record reads the file."""

SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "zsre": {"test": ("zsre_knowedit.json", "ZsRE-test-all.json", "zsre.json")},
    "zsre-mend": {
        "test": ("zsre_mend_eval_portability_gpt4.json", "zsre_mend_eval.json"),
        "train": ("zsre_mend_train_10000.json", "zsre_mend_train.json"),
    },
    "counterfact": {
        "test": ("counterfact.json", "counterfact-edit.json", "multi_counterfact.json"),
        "train": ("counterfact-train.json",),
    },
    "wiki_recent": {"test": ("wiki_recent.json", "recent_test.json"), "train": ("recent_train.json",)},
    "wiki_counterfact": {"test": ("wiki_counterfact.json", "test_cf.json"), "train": ("train_cf.json",)},
    "mquake": {
        "test": ("MQuAKE-2002.json", "MQuAKE-CF-3k-v2.json", "MQuAKE-CF-3k.json", "MQuAKE-CF.json", "mquake_cf_354.json"),
        "hard": ("MQuAKE-hard.json", "mquake_hard.json"),
        "temporal": ("MQuAKE-T.json",),
    },
    "wikibio": {"test": ("wikibio-test-all.json",), "train": ("wikibio-train-all.json",)},
}
"""Set -> split -> the file names it goes by, the preferred first. The first split is the default."""


def names() -> list[str]:
    """What `load` knows by name."""
    return ["atlas", *SETS]


def load(
    name_or_path: str | Path, data_dir: str | Path | None = None, limit: int | None = None, split: str | None = None
) -> list[EditCase]:
    """The cases of a data set or a file, in the file's order.

    name_or_path: one of `names()`, looked for in `data_dir` (or $ERRATA_DATA) and two levels below, or a path.
    limit: only the first so many cases (records after them are not checked).
    split: a named set's part, "test" unless said otherwise ("atlas": "test", "dev", or None for both).

    Raises DataError: unknown name, no such file, not JSON, format not recognised, a broken record (with file, record and field), an id
    that occurs twice.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; take at least one case, or leave it out to take all")
    if str(name_or_path) == "atlas":
        from errata.data import atlas  # the bundled world is generated; only those who ask for it pay for it

        if split not in (None, "dev", "test"):
            raise DataError(f"data set 'atlas' has no split {split!r}; it has dev, test")
        return list(islice(atlas.cases(split), limit))  # type: ignore[arg-type]  # just checked
    path = find(name_or_path, data_dir, split)
    records = _records(path)
    cases = list(islice(sniff(records[0]).cases(records), limit))
    first: dict[str, Record] = {}
    for case, record in zip(cases, records, strict=False):  # `cases` is the shorter one under a limit
        if (other := first.setdefault(case.id, record)) is not record:
            field = "case_id" if "case_id" in record.raw else "id"
            raise record.error(field, f"{case.id!r} is already the id of {other.place}; ids must differ")
    return cases


def find(name_or_path: str | Path, data_dir: str | Path | None = None, split: str | None = None) -> Path:
    """The file that a name or path stands for. Raises DataError where there is none."""
    name, path = str(name_or_path), Path(name_or_path)
    if name not in SETS:
        if path.is_file():
            if split is not None:
                raise DataError(f"{name} is a file and has no split {split!r}; leave `split` out, or name the data set: {', '.join(SETS)}")
            return path
        if path.suffix in {".json", ".jsonl"} or len(path.parts) > 1:
            raise DataError(f"no such data file: {name}")
        close = get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"no data set {name!r}{hint} (known: {', '.join(names())}; or give a file)")
    splits = SETS[name]
    if split is not None and split not in splits:
        raise DataError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}")
    files = splits[split] if split else next(iter(splits.values()))
    folder = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT)
    if folder is None:
        ways = f"say the folder that holds {files[0]} (data_dir, --data-dir or ${ENVIRONMENT}), or give the file itself"
        raise DataError(f"where is data set {name!r}? {ways}")
    for file in files:
        for level in ("", "*/", "*/*/"):
            if found := next((place for place in sorted(Path(folder).glob(level + file)) if place.is_file()), None):
                return found
    wanted = " or ".join(files)
    raise DataError(f"data set {name!r}: no {wanted} in {folder} or two levels below; download it there, or give the file itself")


def sniff(record: Record) -> Format:
    """The format of a record. Raises DataError naming its fields and the formats that are known."""
    for known in FORMATS:
        if known.recognises(record.raw):
            return known
    fields, formats = ", ".join(map(str, record.raw)) or "none", "; ".join(known.name for known in FORMATS)
    raise DataError(f"{record.place}: not recognised by its fields ({fields}); known formats: {formats}")


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal, to be kept with results. OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(path: Path) -> list[Record]:
    """All records of a file: an array if its first character is a bracket, else an object a line, whatever its name ends in."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start == b"[":
            items = json.loads(path.read_bytes().decode("utf-8-sig"))
            found = [Record(raw, f"{path}, record {number}", number) for number, raw in enumerate(items)]
        else:
            found = [Record(raw, f"{path}, line {line}", number) for number, (line, raw) in enumerate(read_jsonl(path))]
    except FactError as error:  # from read_jsonl, which has named file and line
        raise error if isinstance(error, DataError) else DataError(str(error)) from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected an array of records, or one record a line") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"{path} holds no records")
    return found
