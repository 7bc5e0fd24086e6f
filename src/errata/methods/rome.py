"""ROME: one rank-one write that makes W k = v* exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edits.delta import Delta
from errata.lm.capture import submodule
from errata.methods.base import Session
from errata.methods.locate.ridge import Ridge, identity_prior
from errata.methods.locate.session import Locate, LocateSession, Stopwatch, Writes
from errata.methods.locate.sweep import Reached, Sweep
from errata.methods.locate.value import Values, find_values

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

_LLAMA = {"layers": (5,), "steps": 25, "decay": 1e-3}


@dataclass(frozen=True)
class ROME(Locate):
    """Rank-one model editing (Meng et al. 2022, arXiv 2202.05262, eq. 2–4): Δ = (v* − W k) uᵀ / (uᵀ k) with u = C⁻¹ k.

    whiten: u = C⁻¹ k; off: u = k, for a model without second moments.
    key: "mean" over all contexts, everywhere. "mixed" is the authors' code: u from that mean, but uᵀ k and W k from the bare prompt's
        key, which is held to be what makes long sequences collapse (arXiv 2403.07175).
    """

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "arXiv 2202.05262"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"steps": 25, "lr": 0.5, "decay": 1e-3, "clamp": 4.0},
        "gpt2-xl": {"layers": (17,), "steps": 20, "decay": 0.5},
        "gpt-j-6b": {"layers": (5,), "steps": 20, "decay": 0.5},
        "llama-2-7b": _LLAMA,
        "llama-3-8b": _LLAMA,
        "llama-3.1-8b": _LLAMA,
        "qwen2.5-7b": _LLAMA,
        "atlas": {"layers": (0,), "lr": 1.0},
    }

    whiten: bool = True
    key: Literal["mean", "mixed"] = "mean"

    @property
    def spreads(self) -> bool:
        """One layer."""
        return False

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return _Rome(lm, self, objective, seed)


class _Rome(LocateSession):
    method: ROME

    def ridge(self, layer: int) -> Ridge:
        prior = self.inverse(layer) if self.method.whiten else identity_prior
        return Ridge(prior, self.lm.anatomy.key_size, slack=0.0, device=self.device)

    def key(self, contexts: Tensor) -> Tensor:
        return contexts.mean(1)

    def values(self, sweep: Sweep | Reached, requests: list[Any]) -> Values:
        return find_values(self.lm, self.layers[-1], requests, sweep.outputs[:, 0], self.method.search, self.objective)

    def write(self, sweep: Sweep, values: Values, clock: Stopwatch) -> tuple[list[Delta], Writes]:
        (layer,) = self.layers
        mean = self.key(sweep.keys)
        key = sweep.keys[:, 0] if self.method.key == "mixed" else mean
        with torch.no_grad():
            written = submodule(self.lm.model, self.lm.anatomy.mlp_down[layer])(key.to(self.lm.dtype))  # W k, and the bias if there is one
            residual = sweep.outputs[:, 0] + values.delta - written
        beta = self.solve(layer, mean)
        if self.method.key == "mixed":  # the same direction, of another length: β k = 1 at the bare prompt's key
            beta = torch.linalg.solve(beta @ key.to(beta).T, beta)
        return [self.low_rank(layer, residual, beta)], [(layer, key, residual)]
