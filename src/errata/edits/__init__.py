"""What editing leaves behind: deltas, edits that can be applied, reverted, saved and loaded, and the stack of active ones."""

from __future__ import annotations

from errata.edits.delta import Delta, DenseDelta, LowRankDelta, Replacement
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.edits.memory import Memory
from errata.edits.stack import Stack

__all__ = ["Delta", "DenseDelta", "Edit", "EditError", "LowRankDelta", "Memory", "Replacement", "Stack"]
