"""Tensors on the disk under the SHA-256 of their file: written whole or not at all, never changed, shared by all who name them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from errata.disk import folders, replacing
from errata.edits.errors import LedgerDamaged

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"


class Objects:
    """A folder of safetensors files, named by their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep tensors; their name. When it returns they are on the disk."""
        from safetensors.torch import save  # torch: not for listing and undoing

        from errata.edits.edit import storable

        data = save(storable(tensors))
        name = hashlib.sha256(data).hexdigest()
        path = self.path(name)
        if not path.is_file() or path.read_bytes() != data:  # what is damaged is mended
            folders(path.parent)
            with replacing(path) as file:
                file.write_bytes(data)
        return name

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put under that name. Raises LedgerDamaged if it is missing or not what it was."""
        from safetensors.torch import load

        return load(self.read(name))

    def read(self, name: str) -> bytes:
        """The file of that name. Raises as `get`."""
        path = self.path(name)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise LedgerDamaged(f"{path} is missing; put it back from a backup") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise LedgerDamaged(f"{path} is damaged: its SHA-256 is not its name; put it back from a backup")
        return data

    def path(self, name: str) -> Path:
        """Where an object of that name lies."""
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def take(self, name: str, other: Objects) -> None:
        """Keep what another folder has under that name. Raises LedgerDamaged if it is missing or damaged there."""
        data = other.read(name)
        folders(self.path(name).parent)
        with replacing(self.path(name)) as file:
            file.write_bytes(data)

    def sweep(self, needed: set[str]) -> None:
        """Remove what nobody needs: what was written of an edit that never came to be."""
        for folder in self.folder.glob("??"):
            for path in folder.iterdir():
                if path.name.removesuffix(SUFFIX) not in needed:
                    with suppress(OSError):  # a later one will
                        path.unlink()
            with suppress(OSError):  # not empty, mostly
                folder.rmdir()
