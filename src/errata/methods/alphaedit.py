"""AlphaEdit: writes that ordinary keys do not feel at all, because they lie in the null space of their second moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from errata.methods.base import Session, check_range
from errata.methods.locate.ridge import Ridge, null_space_prior
from errata.methods.locate.session import Locate, LocateSession
from errata.methods.memit import CRITICAL
from errata.statistics.nullspace import NullSpace, null_space_for

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

SHARE = 0.7
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "gpt2-xl": {"l2": 10.0, "threshold": 2e-2},
    "gpt-j-6b": {"l2": 10.0, "threshold": 2e-2},
    "llama-2-7b": {"l2": 10.0, "threshold": 2e-2},
    "llama-3-8b": {"l2": 10.0, "threshold": 2e-2},
    "llama-3.1-8b": {"l2": 10.0, "threshold": 2e-2},
    "qwen2.5-7b": {"l2": 1.0, "threshold": 2e-2},
    "atlas": {"l2": 1.0, "threshold": 2e-2},  # tuned on the dev cases
}


@dataclass(frozen=True)
class AlphaEdit(Locate):
    """Null-space constrained editing (Fang et al. 2024, arXiv 2410.02355): (P (K_p K_pᵀ + K Kᵀ) + L2·I) β = P K (DeltaEdit eq. 8, 9).

    P projects on the eigenvectors of C with eigenvalues below a threshold; K_p are the keys of all earlier edits of the session.

    threshold: the eigenvalue below which a direction counts as unused. share: the part of the directions that counts as unused
        instead, those with the smallest eigenvalues. Both None: the published threshold for its families, else a share of 0.7, which
        is about what the threshold keeps on Llama-3.
    l2: the ridge. None: the published one for its families, else a tenth of `NullSpace.energy`, the mean squared length of ordinary
        keys inside the null space.
    """

    name: ClassVar[str] = "alphaedit"
    paper: ClassVar[str] = "arXiv 2410.02355"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        family: {**values, **_PUBLISHED.get(family, {})} for family, values in CRITICAL.items()
    }

    l2: float | None = None
    threshold: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "l2", self.l2, 0, above=True)
        check_range(self.name, "threshold", self.threshold, 0, above=True)
        check_range(self.name, "share", self.share, 0, 1, above=True)
        if self.threshold is not None and self.share is not None:
            raise ValueError(f"{self.name}: give a threshold for the eigenvalues or a share of the directions, not both")

    def for_model(self, lm: LanguageModel) -> Self:
        """See `Locate.for_model`."""
        chosen = super(AlphaEdit, replace(self, share=None)).for_model(lm)
        if self.share is not None or chosen.threshold is None:  # a share that was asked for counts before the family's threshold
            return replace(chosen, threshold=None, share=self.share or SHARE)
        return chosen

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return AlphaSession(lm, self, objective, seed)


class AlphaSession(LocateSession):
    """Also DeltaEdit's, whose β is the same."""

    method: AlphaEdit

    @property
    def keeps(self) -> bool:
        """See `LocateSession.keeps`."""
        return True

    def ridge(self, layer: int) -> Ridge:
        return Ridge(null_space_prior(self.space(layer).project, self.l2(layer)), self.lm.anatomy.key_size, device=self.device)

    def l2(self, layer: int) -> float:
        """The ridge of a layer."""
        return self.space(layer).energy / 10 if self.method.l2 is None else self.method.l2

    def space(self, layer: int) -> NullSpace:
        """The null space of the unedited model's keys at a layer."""
        threshold, share = self.method.threshold, self.method.share
        return null_space_for(self.lm, self.moments, layer, threshold, share)

    def diagnostics(self) -> dict[str, Any]:
        shares, ridges = ([part(layer) for layer in self.layers] for part in (lambda i: self.space(i).share, self.l2))
        return {"null_space_share": round(min(shares), 4), "least_l2": min(ridges)}
