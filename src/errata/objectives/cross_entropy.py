"""Cross-entropy on the target tokens: what the editors were published with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from errata.objectives.base import Objective, ObjectiveValue, Reduction, check_inputs, check_reduction, reduce_tokens, working_dtype


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """−log π_θ(y_i | c_i) for each target token, reduced over the tokens of an edit.

    reduction: "mean" over the edit's own target tokens (as in the toolkits), or "sum" (as in OVERTONE's §2).
    """

    name: ClassVar[str] = "ce"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def evaluate(self, logits: Tensor, targets: Tensor, mask: Tensor, reference: Tensor | None = None) -> ObjectiveValue:
        """See `Objective.evaluate`. Every target token stays active, however small its loss; `reference` is not used."""
        check_inputs(logits, targets, mask)
        labels = targets.masked_fill(~mask, -100)
        flat = logits.to(working_dtype(logits)).flatten(0, 1)  # [B·T, V]
        loss = F.cross_entropy(flat, labels.flatten(), ignore_index=-100, reduction="none").view_as(targets)
        return ObjectiveValue(reduce_tokens(loss, mask, self.reduction), mask)
