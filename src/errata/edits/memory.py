"""What an editor keeps beside the weights: a memory that is asked before the model answers (MELO, WISE, retrieval).

A memory is a value, never changed once it is made: each edit of a session leaves a new one that holds all earlier edits of the session too
and shares their tensors. So an edit with a memory can be applied, reverted, saved and loaded like any other.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from errata.edits.errors import EditError

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

HOMES: Mapping[str, str] = {
    "codebook": "errata.edits.codebook:CodeBook",
    "notes": "errata.edits.notes:Notes",
    "side": "errata.edits.side:SideMemory",
}
"""Kind, as it is saved -> "module:Class"; imported when an edit of that kind is loaded."""


class Memory(ABC):
    """kind: what it is called in a saved edit.

    id: names this memory among others; parent: the id of the one it grew from, None for a session's first. See `grown_id`.
    """

    kind: ClassVar[str]
    id: str
    parent: str | None

    @abstractmethod
    def attached(self, lm: LanguageModel) -> AbstractContextManager[object]:
        """While it lasts, the model answers with this memory; afterwards it is as it was, whatever happened.

        Raises EditError if the memory does not fit the model; then nothing is attached.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else but `id` and `parent`, ready for JSON."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], id: str, parent: str | None) -> Self:
        """What `settings` and `tensors` were taken from."""

    def state(self) -> dict[str, Any]:
        """All of it, as `load_memory` reads it."""
        return {"kind": self.kind, "id": self.id, "parent": self.parent, "settings": self.settings(), "tensors": self.tensors()}


def load_memory(state: Mapping[str, Any]) -> Memory:
    """The memory whose `state()` this is. Raises EditError for a kind that this errata does not know."""
    if state["kind"] not in HOMES:
        raise EditError(f"no memory is called {state['kind']!r}; known: {', '.join(HOMES)}; install a newer errata")
    module, _, name = HOMES[state["kind"]].partition(":")
    restored: Memory = getattr(import_module(module), name).restore(state["settings"], state["tensors"], state["id"], state["parent"])
    return restored


def grown_id(parent: str | None, *parts: Sequence[Any] | Mapping[str, Any] | str | int | None) -> str:
    """A name for a memory: from the one it grew from and from what made it (facts, method, objective, seed), ready for JSON."""
    return hashlib.sha256(json.dumps([parent, *parts], sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
