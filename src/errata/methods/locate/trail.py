"""How a session goes on from earlier edits without their keys: from what is small and stands in the edits, or else by another look.

What an edit adds to a write rule is (Lᵀβ)ᵀ(Lᵀβ) (`errata.methods.locate.ridge`): its own β, and F numbers by F. That holds where the
write rule is the one with which the edit was solved, so an edit also says on what it was made: the statistics, and all that was in the
model then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from errata.edits.delta import Delta, LowRankDelta
from errata.edits.edit import Trail
from errata.edits.errors import EditError
from errata.methods.locate.ridge import Ridge

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.edit import Edit

ENOUGH = 1e-3
"""The share by which M may be off because β was rounded to what the weights are summed in."""


def trail(after: str, ridges: Mapping[int, Ridge], deltas: Mapping[int, Delta], keys: Mapping[int, Tensor]) -> Trail:
    """Of an edit that has just been solved, by layer; after: on what it was made.

    Where β does not stand in the edit (RECT's dense deltas), or not precisely enough (moments that leave directions all but free, keys
    of one edit that are nearly the same), it keeps the keys themselves.
    """
    tensors: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        factor = ridges[layer].solved(delta.right, ENOUGH) if isinstance(delta, LowRankDelta) else None
        tensors |= {f"keys.{layer}": keys[layer]} if factor is None else {f"factor.{layer}": factor}
    return Trail(after, tensors)


def recall(ridges: Mapping[int, Ridge], edit: Edit) -> None:
    """Put an edit into the write rules, from its trail. Raises EditError if it has none for one of them."""
    kept = edit.trail.tensors if edit.trail else {}
    deltas = edit.deltas[: len(ridges)]  # behind them there may be what ended the sequence
    for (layer, ridge), delta in zip(ridges.items(), deltas, strict=True):
        if isinstance(delta, LowRankDelta) and f"factor.{layer}" in kept:
            ridge.recall(delta.right, kept[f"factor.{layer}"])
        elif f"keys.{layer}" in kept:
            ridge.remember(kept[f"keys.{layer}"])
        else:
            raise EditError(f"{edit} does not say what a session must know to remember it (made by an older errata?); resume() with it")


def beginning(*parts: object) -> str:
    """What a history is called that nothing is in yet, by what it stands on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def follow(history: str, edit: Edit) -> str:
    """What it is called with one edit more."""
    return hashlib.sha256(f"{history} {edit.content}".encode()).hexdigest()
