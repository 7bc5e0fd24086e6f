"""What editing leaves behind: deltas, edits that can be applied, reverted, saved and loaded, and the stack of active ones.

Names are imported at first use, so that a ledger is listed, or an edit undone in it, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.lazy import lazily

if TYPE_CHECKING:
    from errata.edits.delta import Delta, DenseDelta, LowRankDelta, Replacement
    from errata.edits.edit import Edit
    from errata.edits.errors import EditError
    from errata.edits.memory import Memory
    from errata.edits.stack import Stack

_HOME = {
    "delta": ("Delta", "DenseDelta", "LowRankDelta", "Replacement"),
    "edit": ("Edit",),
    "errors": ("EditError",),
    "memory": ("Memory",),
    "stack": ("Stack",),
}

__all__ = ["Delta", "DenseDelta", "Edit", "EditError", "LowRankDelta", "Memory", "Replacement", "Stack"]

__getattr__ = lazily(__name__, _HOME)
