"""RECT: MEMIT's write, of which only the entries that change their weight most are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from errata.edits.delta import Delta, DenseDelta, LowRankDelta
from errata.lm.anatomy import is_conv1d, matrix
from errata.lm.capture import submodule
from errata.methods.base import Session, check_range
from errata.methods.memit import MEMIT, MemitSession

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class RECT(MEMIT):
    """Relative change in weight (Gu et al. 2024, arXiv 2401.04700): of Δ keep the entries with the largest |Δ / (W + 1e-8)|.

    keep: their share; 0.4 as in AlphaEdit's port, which DeltaEdit compares with (the authors keep 0.2, of ROME's Δ).
    """

    paper: ClassVar[str] = "arXiv 2401.04700"

    keep: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "keep", self.keep, 0, 1, above=True)

    @property
    def name(self) -> str:  # type: ignore[override]  # MEMIT's depends on its history
        """rect."""
        return "rect"

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return _Rect(lm, self, objective, seed)


class _Rect(MemitSession):
    method: RECT

    @torch.no_grad()
    def shape(self, layer: int, delta: LowRankDelta) -> Delta:
        module = submodule(self.lm.model, delta.path)
        dense = delta.left @ delta.right  # [d, d_in]
        relative = (dense / (matrix(module).to(dense) + 1e-8)).abs()
        kept = max(1, round(self.method.keep * relative.numel()))
        least = relative.flatten().kthvalue(relative.numel() - kept + 1).values
        dense.masked_fill_(relative < least, 0.0)
        return DenseDelta(delta.path, dense.T.contiguous() if is_conv1d(module) else dense)
