"""Tensors with a record beside them in one safetensors file, which is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.disk import replacing
from errata.statistics.errors import StatisticsError

KEY = "errata"

Record = dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """In the place of `path`, in one step (`replacing`). Nothing is copied in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(dict(tensors), file, metadata={KEY: json.dumps(dict(record), ensure_ascii=False)})


def read_record(path: Path) -> Record:
    """The record alone. Raises StatisticsError if there is no such file, or it is not one of ours."""
    return _open(path, lambda name: False)[0]


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Record, dict[str, Tensor]]:
    """The record and the wanted tensors, on the CPU; the others are not read. Raises StatisticsError as `read_record` does."""
    return _open(path, wanted)


def _open(path: Path, wanted: Callable[[str], bool]) -> tuple[Record, dict[str, Tensor]]:
    if not path.is_file():
        raise StatisticsError(f"there is no file {path}; give what 'errata stats collect --out' wrote")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118  # not a mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path} is damaged, or holds no statistics of errata ({error}); collect them again") from error
    if not isinstance(record, dict):
        raise StatisticsError(f"{path} is damaged: its record is a {type(record).__name__}; collect the statistics again")
    return record, tensors
