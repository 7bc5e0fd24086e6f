"""How a session goes on from earlier edits without their keys: from what is small and stands in the edits, or else by another look.

What an edit adds to a write rule is (Lᵀβ)ᵀ(Lᵀβ) (`errata.methods.locate.ridge`): its own β, and F numbers by F. That holds where the
history is the one with which the edit was solved, so an edit also says what that was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from errata.edits.delta import Delta, LowRankDelta
from errata.edits.edit import Trail
from errata.methods.locate.ridge import Ridge

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.edit import Edit

ENOUGH = 1e-3
"""By how much of itself what is left of a key's share in M may err. kᵀMk · eps is what β costs that come in another precision than M's."""


def trail(after: str, ridges: Mapping[int, Ridge], deltas: Mapping[int, Delta], keys: Mapping[int, Tensor]) -> Trail:
    """Of an edit that has just been solved, by layer; after: the history it was solved with.

    Where β does not stand in the edit (RECT's dense deltas), or not precisely enough (moments that leave directions all but free), it
    keeps the keys themselves.
    """
    tensors: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        factor = ridges[layer].factor
        assert factor is not None
        right = delta.right if isinstance(delta, LowRankDelta) else None
        if right is not None and float(factor.diagonal().max()) ** 2 * torch.finfo(right.dtype).eps < ENOUGH:
            tensors[f"factor.{layer}"] = factor
        else:
            tensors[f"keys.{layer}"] = keys[layer]
    return Trail(after, tensors)


def recall(ridges: Mapping[int, Ridge], edit: Edit, deltas: Mapping[int, Delta]) -> None:
    """Put an edit into the histories, from its trail."""
    kept = edit.trail.tensors if edit.trail else {}
    for layer, ridge in ridges.items():
        delta = deltas[layer]
        if isinstance(delta, LowRankDelta) and f"factor.{layer}" in kept:
            ridge.recall(delta.right, kept[f"factor.{layer}"])
        elif f"keys.{layer}" in kept:
            ridge.remember(kept[f"keys.{layer}"])


def follow(history: str, edit: Edit) -> str:
    """What the history is called with this edit after all others; "" is the name of none."""
    named = hashlib.sha256(history.encode())
    for delta in edit.deltas:
        for name, tensor in delta.tensors().items():
            named.update(f"{delta.path} {name}".encode())
            named.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return named.hexdigest()[:16]


def torn(history: str, edits: Sequence[Edit]) -> int:
    """How many of the edits, from the first on, end with the last that was not solved with exactly those before it, behind `history`."""
    count = 0
    for place, edit in enumerate(edits, 1):
        if edit.trail is None or edit.trail.after != history:
            count = place
        history = follow(history, edit)
    return count
