"""Two edits of a ledger side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.edits.delta import Delta, LowRankDelta
from errata.edits.edit import assembled
from errata.edits.ledger import Ledger
from errata.edits.rows import Entry


def compare(ledger: Ledger, one: Entry, other: Entry) -> dict[str, Any]:
    """{"settings": name -> (of one, of the other) where they differ, "matrices": path -> {"a", "b", "cosine"}}.

    a, b: ‖Δ‖ (Frobenius), None where an edit does not touch the matrix; cosine: of the two changes, None where one is missing or zero.
    Raises EditError if tensors are missing or damaged.
    """
    left, right = (_changes(ledger, entry) for entry in (one, other))
    matrices: dict[str, dict[str, float | None]] = {}
    for path in dict.fromkeys([*left, *right]):
        a, b = left.get(path), right.get(path)
        norms = [None if change is None else float(_inner(change, change) ** 0.5) for change in (a, b)]
        cosine = _inner(a, b) / (norms[0] * norms[1]) if a and b and norms[0] and norms[1] else None
        matrices[path] = {"a": norms[0], "b": norms[1], "cosine": cosine}
    said = [
        {"facts": "; ".join(map(str, e.facts)), "seed": e.seed, **_flat("method", e.method), **_flat("objective", e.objective)}
        for e in (one, other)
    ]
    names = dict.fromkeys([*said[0], *said[1]])
    settings = {name: (said[0].get(name), said[1].get(name)) for name in names if said[0].get(name) != said[1].get(name)}
    return {"settings": settings, "matrices": matrices}


def _changes(ledger: Ledger, entry: Entry) -> dict[str, list[Delta]]:
    tensors = {} if entry.tensors is None else ledger.objects.get(entry.tensors)
    found: dict[str, list[Delta]] = {}
    for delta in assembled(entry.layout, tensors)[0]:
        found.setdefault(delta.path, []).append(delta)
    return found


def _inner(one: list[Delta], other: list[Delta]) -> float:
    """⟨Δ, Δ'⟩ of two sums of deltas, without forming low-rank products: tr((L R)ᵀ L'R') = Σ (LᵀL') ∘ (R R'ᵀ)."""
    return sum(_pair(a, b) for a in one for b in other)


def _pair(a: Delta, b: Delta) -> float:
    if isinstance(a, LowRankDelta) and isinstance(b, LowRankDelta):
        return float(((a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)).sum())
    return float((_whole(a, b) * _whole(b, a)).sum())


def _whole(delta: Delta, beside: Delta) -> Tensor:
    """As a matrix; low-rank ones in the orientation in which the other one is stored."""
    if not isinstance(delta, LowRankDelta):
        return delta.tensors()["tensor"].double()
    product = delta.left.double() @ delta.right.double()
    stored = beside.tensors().get("tensor", product)
    return product if stored.shape == product.shape else torch.t(product)


def _flat(name: str, record: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{name}.{key}" if key != "name" else name: value for key, value in (record or {}).items()}
