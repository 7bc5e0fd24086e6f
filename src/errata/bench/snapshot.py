"""Where a sequence stands, on the disk in one step: what it needs to go on to the very bits of a run that was never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.bench.plan import PlanError
from errata.disk import replacing
from errata.edits import Edit, Stack
from errata.edits.edit import Layout, assembled
from errata.edits.memory import load_memory

if TYPE_CHECKING:
    from torch import Tensor

    from errata.lm import LanguageModel


class Snapshot(NamedTuple):
    """edits: so many cases had been edited. layout, tensors: what the edits have come to, as `Edit.parts` gives it of the folded one.

    memory: what the edits keep beside the weights, as `Memory.state` gives it.
    """

    edits: int
    layout: Layout
    tensors: Mapping[str, Tensor]
    session: Mapping[str, Any]
    trace: Mapping[str, Any]
    memory: Mapping[str, Any] | None = None

    @classmethod
    def take(cls, lm: LanguageModel, edits: int, session: Mapping[str, Any], trace: Mapping[str, Any]) -> Snapshot:
        """Fold what is applied to `lm`, which leaves its weights as they are, and keep it with the two states."""
        folded = Stack.of(lm).fold()
        memory = None if folded.memory is None else folded.memory.state()
        return cls(edits, *folded.parts(), session, trace, memory)

    def restore(self, lm: LanguageModel) -> None:
        """Bring the unedited `lm` to where it was."""
        memory = None if self.memory is None else load_memory(self.memory)
        deltas, _ = assembled(self.layout, self.tensors)
        Edit(lm, deltas, [], {"name": "folded"}, memory=memory).apply()

    def save(self, path: Path) -> None:
        """Replace the file at `path`: whoever is killed meanwhile finds the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(self._asdict(), file)

    @classmethod
    def load(cls, path: Path) -> Snapshot | None:
        """What `save` wrote; None where there is none. Raises PlanError for a file that cannot be read."""
        if not path.exists():
            return None
        try:
            return cls(**torch.load(path, weights_only=True))
        except Exception as error:  # zip, pickle and torch each have errors of their own
            raise PlanError(f"{path} is damaged ({type(error).__name__}); remove it and resume: the sequence begins again") from error
