"""MEMIT: facts in their hundreds, shared out over several layers, each write a ridge regression against what must not move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from errata.methods.base import Session, check_range
from errata.methods.locate.ridge import Ridge
from errata.methods.locate.session import Locate, LocateSession

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

_LLAMA_3 = {"layers": (4, 5, 6, 7, 8), "lr": 0.1, "clamp": 0.75, "decay": 0.5, "weight": 15000.0}
_LLAMA_2 = {"layers": (4, 5, 6, 7, 8), "clamp": 4.0, "decay": 1e-3, "weight": 15000.0}

CRITICAL: Mapping[str, Mapping[str, Any]] = {
    "": {"steps": 25, "lr": 0.5, "decay": 1e-3, "clamp": 4.0},
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "steps": 20, "clamp": 0.75, "decay": 0.5, "weight": 20000.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "clamp": 0.75, "decay": 0.5, "weight": 15000.0},
    "llama-2-7b": _LLAMA_2,
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": _LLAMA_3,
    "qwen2.5-7b": _LLAMA_2,
    "atlas": {"layers": (0, 1, 2), "lr": 1.0, "weight": 300.0},  # tuned on the dev cases
}
"""Critical layers and search, family by family; AlphaEdit's and DeltaEdit's too, but for what they change."""


@dataclass(frozen=True)
class MEMIT(Locate):
    """Mass-editing memory in a transformer (Meng et al. 2023, arXiv 2210.07229, eq. 14, 20): β = (λ C + K Kᵀ)⁻¹ K (DeltaEdit eq. 6, 9).

    weight: λ, how much the second moments C count against the keys. None: the published one for its families, else the width d_in of
        the keys, which makes λ C count as much at every size (15,000 is for d_in = 14,336).
    history: the keys of earlier edits of the session stay in the sum, so that what was written before must not move either.
    """

    paper: ClassVar[str] = "arXiv 2210.07229"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = CRITICAL

    weight: float | None = None
    history: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "weight", self.weight, 0, above=True)

    @property
    def name(self) -> str:  # type: ignore[override]  # the history is part of the name
        """memit, or memit+history."""
        return "memit+history" if self.history else "memit"

    def for_model(self, lm: LanguageModel) -> Self:
        """See `Locate.for_model`."""
        chosen = super().for_model(lm)
        return replace(chosen, weight=float(lm.anatomy.key_size) if chosen.weight is None else chosen.weight)

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return MemitSession(lm, self, objective, seed)


class MemitSession(LocateSession):
    """Also RECT's and PRUNE's, which write as MEMIT does."""

    method: MEMIT

    def ridge(self, layer: int) -> Ridge:
        inverse, weight = self.inverse(layer), self.method.weight
        assert weight is not None  # for_model filled it in
        return Ridge(lambda keys: inverse(keys) / weight, self.lm.anatomy.key_size, device=self.device)

    @property
    def keeps(self) -> bool:
        """See `LocateSession.keeps`."""
        return self.method.history
