"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which takes the place of `path` when all is written and on the disk.

    Whoever is killed meanwhile leaves the old file or the new one, and a power cut does too. Two processes may write the same path at the
    same moment: the later one stays. Raises OSError (full disk …); then the old file is there, and nothing else.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        to_disk(path.parent)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A draft of a folder, which takes its place when all is written and vanishes otherwise. The folder must be empty, or not there.

    Raises OSError (full disk …); then nothing is there that was not before.
    """
    folder = folder.resolve()  # not a link to it, nor ".", which could not be replaced
    folders(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "draft"
        draft.mkdir()
        yield draft
        os.rename(draft, folder)
    if os.name == "posix":
        to_disk(folder.parent)


def folders(path: Path) -> None:
    """Make a folder and those that it lies in. When it returns their names are on the disk."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        for place in reversed(missing):
            to_disk(place.parent)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
