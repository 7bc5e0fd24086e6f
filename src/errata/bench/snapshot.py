"""Where a sequence stands, on the disk in one step: what it needs to go on to the very bits of a run that was never stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.bench.plan import PlanError
from errata.edits import Edit, Replacement, Stack
from errata.edits.memory import load_memory

if TYPE_CHECKING:
    from torch import Tensor

    from errata.lm import LanguageModel


class Snapshot(NamedTuple):
    """edits: so many cases had been edited. weights: touched module -> its weight, in the precision in which deltas are summed.

    memory: what the edits keep beside the weights, as `Memory.state` gives it.
    """

    edits: int
    weights: Mapping[str, Tensor]
    session: Mapping[str, Any]
    trace: Mapping[str, Any]
    memory: Mapping[str, Any] | None = None

    @classmethod
    def take(cls, lm: LanguageModel, edits: int, session: Mapping[str, Any], trace: Mapping[str, Any]) -> Snapshot:
        """Fold what is applied to `lm`, which leaves its weights as they are, and keep it with the two states."""
        folded = Stack.of(lm).fold()
        memory = None if folded.memory is None else folded.memory.state()
        return cls(edits, {delta.path: delta.tensors()["tensor"] for delta in folded.deltas}, session, trace, memory)

    def restore(self, lm: LanguageModel) -> None:
        """Bring the unedited `lm` to where it was."""
        memory = None if self.memory is None else load_memory(self.memory)
        deltas = [Replacement(path, tensor) for path, tensor in self.weights.items()]
        Edit(lm, deltas, [], {"name": "folded"}, memory=memory).apply()

    def save(self, path: Path) -> None:
        """Replace the file at `path`: whoever is killed meanwhile finds the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            torch.save(self._asdict(), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)

    @classmethod
    def load(cls, path: Path) -> Snapshot | None:
        """What `save` wrote; None where there is none. Raises PlanError for a file that cannot be read."""
        if not path.exists():
            return None
        try:
            return cls(**torch.load(path, weights_only=True))
        except Exception as error:  # zip, pickle and torch each have errors of their own
            raise PlanError(f"{path} is damaged ({type(error).__name__}); remove it and resume: the sequence begins again") from error
