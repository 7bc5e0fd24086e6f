"""What an edit does to one weight matrix.

`path` is the path of a module ("model.layers.3.mlp.down_proj"); the delta changes that module's `weight`. It does not know the
model: whether the module stores its weight transposed (Conv1D) is said by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.errors import EditError


@dataclass(frozen=True, slots=True, eq=False)
class DenseDelta:
    """W ← W + tensor, with `tensor` in the orientation in which the module stores its weight."""

    kind: ClassVar[str] = "dense"
    path: str
    tensor: Tensor

    def __post_init__(self) -> None:
        check_matrix(self.path, tensor=self.tensor)

    def stored_shape(self, transposed: bool) -> tuple[int, ...]:
        """The shape that the module's weight must have."""
        return tuple(self.tensor.shape)

    def add_(self, total: Tensor, transposed: bool) -> None:
        """Add to `total`, the weight as stored, in the dtype and on the device of `total`."""
        total.add_(self.tensor.to(total))

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {"tensor": self.tensor}


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """W ← W + left @ right in the mathematical orientation, W [out, in]: left [out, r], right [r, in].

    A module that stores its weight as [in, out] (Conv1D) is given the transpose.
    """

    kind: ClassVar[str] = "low_rank"
    path: str
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        check_matrix(self.path, left=self.left, right=self.right)
        if self.left.shape[1] != self.right.shape[0]:
            shapes = f"{list(self.left.shape)} and {list(self.right.shape)}"
            raise EditError(f"low-rank delta for {self.path!r}: left must be [out, r] and right [r, in] with one r, got {shapes}")

    @property
    def rank(self) -> int:
        """r, an upper bound of the true rank."""
        return self.left.shape[1]

    def stored_shape(self, transposed: bool) -> tuple[int, ...]:
        """The shape that the module's weight must have."""
        out, width = self.left.shape[0], self.right.shape[1]
        return (width, out) if transposed else (out, width)

    def add_(self, total: Tensor, transposed: bool) -> None:
        """Add to `total`, the weight as stored, in the dtype and on the device of `total`, without forming the product apart."""
        left, right = self.left.to(total), self.right.to(total)
        total.addmm_(right.T, left.T) if transposed else total.addmm_(left, right)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """W ← tensor, whatever was there before: what many edits in a row have come to (`Stack.fold`).

    tensor: in the orientation in which the module stores its weight, in the precision in which deltas are summed (`master_dtype`),
    so that the edits that follow go on from the very sum.
    """

    kind: ClassVar[str] = "replacement"
    path: str
    tensor: Tensor

    def __post_init__(self) -> None:
        check_matrix(self.path, tensor=self.tensor)

    def stored_shape(self, transposed: bool) -> tuple[int, ...]:
        """The shape that the module's weight must have."""
        return tuple(self.tensor.shape)

    def add_(self, total: Tensor, transposed: bool) -> None:
        """Overwrite `total`, the weight as stored, in the dtype and on the device of `total`."""
        total.copy_(self.tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {"tensor": self.tensor}


Delta = DenseDelta | LowRankDelta | Replacement
KINDS: dict[str, type[DenseDelta] | type[LowRankDelta] | type[Replacement]] = {
    kind.kind: kind for kind in (DenseDelta, LowRankDelta, Replacement)
}


def check_matrix(path: str, **tensors: Tensor) -> None:
    """Raise EditError unless `path` names a module and each tensor is a floating-point matrix without a graph."""
    if path.endswith(".weight"):
        raise EditError(f"a delta names a module, not its parameter: write {path.removesuffix('.weight')!r} for {path!r}")
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise EditError(f"{name} for {path!r} must be a floating-point matrix, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.requires_grad:
            raise EditError(f"{name} for {path!r} still carries a graph; detach() it")


def master_dtype(weight: Tensor) -> torch.dtype:
    """Where deltas are summed: float32, or float64 for a float64 weight. In bfloat16 a sequence of small edits would be lost."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
