"""A model together with its edits, loaded and saved as one: what a user of an edited model holds in his hand."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import HfApi

from errata.disk import drafted
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.edits.export import FORMATS, MAX_RANK, Exported, export
from errata.edits.ledger import LOCK, Ledger, New, check_place, is_ledger
from errata.edits.rows import Base
from errata.edits.stack import Stack
from errata.lm import loading

if TYPE_CHECKING:
    import torch

    from errata.lm.model import LanguageModel

EDITS = "edits"
"""The form in which errata itself reads edits again: a ledger."""


def load(
    name_or_path: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    edits: str | Path | None = None,
) -> LanguageModel:
    """Load a causal LM and its tokenizer, with edits applied if a folder of them is given.

    name_or_path: "atlas" (the bundled model), a folder that `save_pretrained` wrote, or a hub id ("gpt2", "Qwen/Qwen3-0.6B"); None: the
        model that the edits were made for.
    dtype: a torch dtype or its name ("bfloat16"); None is the one that the edits were made in, else the checkpoint's own, for the bundled
        model float32 (it is only stored in half).
    device: None is the machine's accelerator if it has one that knows float64, else the CPU; "auto" spreads over all devices.
    edits: a ledger, or a folder that `Edit.save` wrote.
    Raises ModelError or EditError that says which of these failed and what to do.
    """
    base = None if edits is None else base_of(edits)
    if name_or_path is None:
        if base is None:
            raise EditError("there is nothing to load; name a model, or give a folder of edits")
        name_or_path = base.name
    lm = loading.load(name_or_path, dtype=dtype or (base.dtype if base and base.dtype else None), device=device)
    if edits is not None:
        Stack.of(lm).apply(*read_edits(edits, lm))
    return lm


def base_of(folder: str | Path) -> Base:
    """The model that a folder of edits is about; its dtype is "" where it was not written down. Raises EditError if it holds none."""
    if is_ledger(Path(folder)):
        with Ledger.open(folder) as ledger:
            return ledger.base
    return Base(*Edit.base(folder), "")


def read_edits(folder: str | Path, lm: LanguageModel) -> list[Edit]:
    """The active edits of a ledger, or the one that `Edit.save` wrote. Raises EditError if the folder holds neither, or another model's."""
    if is_ledger(Path(folder)):
        with Ledger.open(folder) as ledger:
            return ledger.edits(lm)
    return [Edit.load(folder, lm)]


def together(lm: LanguageModel, edits: Sequence[Edit]) -> Edit:
    """Edits of a model to which nothing is applied as one edit, which does to it what they do in their order."""
    if len(edits) == 1:
        return edits[0]
    stack = Stack.of(lm)
    stack.apply(*edits)
    whole = stack.fold()
    stack.clear()
    return whole


class EditedModel:
    """A model with its edits applied. lm: the model, as it answers now; edits: those that are in it, in their order."""

    def __init__(self, lm: LanguageModel, edits: Sequence[Edit]) -> None:
        self.lm, self.edits = lm, tuple(edits)
        self._ledger: tuple[Path, str] | None = None
        """Where they came from, and its checksum then."""
        Stack.of(lm).apply(*(edit for edit in self.edits if not edit.applied))

    def __repr__(self) -> str:
        return f"EditedModel({self.lm.name!r}, {len(self.edits)} edits)"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        model: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Edits with the model that they are about.

        name_or_path: a ledger, a folder that `Edit.save` wrote, or the hub id of one of these. model: None is the one they name.
        Raises EditError or ModelError that says which of them failed and what to do.
        """
        folder = Path(name_or_path) if Path(name_or_path).exists() else loading.folder_of(str(name_or_path), download=True)
        base = base_of(folder)
        lm = loading.load(model or base.name, dtype=dtype or base.dtype or None, device=device)
        if not is_ledger(folder):
            return cls(lm, read_edits(folder, lm))
        with Ledger.open(folder) as ledger, ledger.snapshot():
            edited = cls(lm, ledger.edits(lm))
            edited._ledger = folder.absolute(), ledger.checksum
        return edited

    def save_pretrained(self, folder: str | Path, format: str = EDITS, max_rank: int = MAX_RANK) -> Exported:
        """Write a new folder: "edits", which `from_pretrained` reads again, or one of the forms of `errata.edits.export.export`.

        What came from a ledger is written as that whole ledger, history and undone edits too. Raises EditError if the folder is in use, or
        that ledger has been changed meanwhile.
        """
        if format == EDITS:
            if self._ledger is None:
                check_place(Path(folder))
                with drafted(Path(folder)) as draft, Ledger.write(draft, self.lm) as ledger:
                    ledger.add(*map(New, self.edits))
            else:
                place, checksum = self._ledger
                with Ledger.open(place) as ledger:
                    if ledger.checksum != checksum:
                        raise EditError(f"the ledger {place} has been changed since the model was loaded with it; load it again")
                    ledger.copy(folder)
            return Exported(str(folder), format, tuple(dict.fromkeys(delta.path for edit in self.edits for delta in edit.deltas)))
        if format not in FORMATS:
            raise EditError(f"unknown format {format!r}; there is {EDITS}, {', '.join(FORMATS)}")
        stack = Stack.of(self.lm)
        active = list(stack.active)
        stack.clear()
        try:
            return export(self.edits, format, folder, max_rank)
        finally:
            stack.apply(*active)

    def push_to_hub(self, repo_id: str, format: str = EDITS, max_rank: int = MAX_RANK, private: bool | None = None, **upload: Any) -> str:
        """`save_pretrained` to a repository of the hub, made if it is not there; its address. upload: for `HfApi.upload_folder`."""
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "model", format, max_rank)
            (Path(scratch) / "model" / LOCK).unlink(missing_ok=True)
            api = HfApi()
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=Path(scratch) / "model", **upload)
        return str(address)
