"""What an objective is: per-token losses on the target tokens, reduced to one loss an edit, and which tokens still matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveValue:
    """loss [B], one number an edit, never mixed over edits; active [B, T], the target tokens that still carry gradient.

    coasts: an edit goes on without them, moved by the optimiser's momentum alone.
    """

    loss: Tensor
    active: Tensor
    coasts: bool = False

    @property
    def finished(self) -> Tensor:
        """[B] bool: edits none of whose tokens is active, unless they coast. Stop them *now*: momentum would go on moving their weights."""
        idle = ~self.active.any(-1)
        return torch.zeros_like(idle) if self.coasts else idle


@runtime_checkable
class Objective(Protocol):
    """The loss of B independent edits from the logits at their target positions.

    Shapes: logits [B, T, V] in any floating dtype (computed in float32, in float64 for float64), finite where the mask is True;
    targets [B, T] long and mask [B, T] bool, False at padding, whose target is ignored. A row without a target token has loss 0.
    """

    @property
    def name(self) -> str:
        """The name under which `errata.objectives.get` finds it."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `evaluate` must be given the logits of the unedited model."""
        return False

    def evaluate(self, logits: Tensor, targets: Tensor, mask: Tensor, reference: Tensor | None = None) -> ObjectiveValue:
        """Loss [B], differentiable in `logits` (once), and active tokens. reference [B, T, V]: logits of the unedited model.

        Raises ValueError if shapes or dtypes disagree, or a reference is needed and missing.
        """
        ...

    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor, reference: Tensor | None = None) -> Tensor:
        """The loss [B] of `evaluate`."""
        return self.evaluate(logits, targets, mask, reference).loss


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32: half precision is too coarse for a KL that is compared with 0.01."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce_tokens(per_token: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """[B, T] to [B]: the sum over a row, or its mean over the row's own target tokens. `per_token` is 0 where the mask is False."""
    total = per_token.sum(-1)
    return total if reduction == "sum" else total / mask.sum(-1).clamp(min=1)


def check_inputs(logits: Tensor, targets: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless logits are floating [B, T, V], targets long [B, T] and mask bool [B, T]."""
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [B, T, V], got {logits.dtype} {list(logits.shape)}")
    for name, tensor, dtype in (("targets", targets, torch.long), ("mask", mask, torch.bool)):
        if tensor.shape != logits.shape[:2] or tensor.dtype != dtype:
            wanted, got = list(logits.shape[:2]), list(tensor.shape)
            raise ValueError(f"{name} must be {dtype} {wanted} to go with the logits, got {tensor.dtype} {got}")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of the two."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' (over an edit's target tokens) or 'mean', got {reduction!r}")
