"""PRUNE: MEMIT, and at the end of the sequence the largest singular values of all that was written are held down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from errata.edits.delta import Delta, DenseDelta
from errata.edits.stack import Stack
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import submodule
from errata.methods.base import Session
from errata.methods.locate.spectrum import growth_base, restrain
from errata.methods.memit import MEMIT, MemitSession

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class PRUNE(MEMIT):
    """Perturbation restraint (Ma et al. 2024, arXiv 2405.16821): singular values of W_T − W_0 above σ_max(W_0) grow as a logarithm only.

    With `history`, the keys that stay in the sum are those before the restraint.

    growth: how they grow beyond it: "log" (the paper's), "log2" …, "linear"; see `restrain`.
    """

    paper: ClassVar[str] = "arXiv 2405.16821"
    together: ClassVar[bool] = False  # an edit is not whole before `finish`

    growth: str = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        growth_base(self.growth)  # unknown ones are refused

    @property
    def name(self) -> str:  # type: ignore[override]  # MEMIT's depends on its history
        """prune."""
        return "prune"

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return _Prune(lm, self, objective, seed)


class _Prune(MemitSession):
    method: PRUNE

    @torch.no_grad()
    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        for layer in self.layers:
            path = self.lm.anatomy.mlp_down[layer]
            transposed = is_conv1d(submodule(self.lm.model, path))
            original, change = Stack.of(self.lm).change(path)
            less = restrain(original.T if transposed else original, change.T if transposed else change, self.method.growth)
            less = (less.T if transposed else less).to(change) - change
            deltas.append(DenseDelta(path, less.contiguous()))
        return deltas
