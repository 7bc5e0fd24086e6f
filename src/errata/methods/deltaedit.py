"""DeltaEdit: AlphaEdit, whose new value is kept orthogonal to all earlier ones when their noise on this edit is unusually loud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.edits.delta import LowRankDelta
from errata.methods.alphaedit import AlphaEdit, AlphaSession
from errata.methods.base import Session, check_range
from errata.methods.locate.history import DeltaHistory, Threshold, project_out
from errata.methods.locate.sweep import Reached, Sweep
from errata.methods.locate.value import Values, find_values

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

_RELEASED = {
    **{"statistic": "norm", "two_sided": True, "warm_up": 20, "start_at": "first", "key": "bare"},
    **{"removed": 0.25, "floor": 0.1, "with_noise": True, "enough": 0.98},
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        **{"statistic": "squared", "two_sided": False, "warm_up": 5, "start_at": "zero", "key": "mean"},
        **{"removed": 0.75, "floor": 0.0, "with_noise": False},
    },
    "released": _RELEASED,
    "relaxed": {**_RELEASED, "removed": 0.1, "retry": 0.9, "patience": 2},
}
"""The open points of the paper: as its text has them, as its authors' code has them (METHODS, the table under DeltaEdit), and with our
remedies for edits that their projector blocks and for thresholds that stay behind for good."""


@dataclass(frozen=True)
class DeltaEdit(AlphaEdit):
    """Sequential editing under dynamic orthogonal constraints (Cao et al. 2025, §4.2, Algorithm 1).

    β as AlphaEdit's. Δ_hist is the sum of what the session wrote into the *last* critical layer. Where ‖Δ_hist k_e‖² is above
    m + η √v (eq. 24), the value is found under P_α = I − Û Ûᵀ (eq. 20, 21), Û the eigenvectors of Δ_hist Δ_histᵀ; else freely, and m, v
    take the new noise in (eq. 22, 23).

    eta, xi: η and the moving averages' memory (the paper's δ).
    preset: fills in what follows where it is None. "paper": Algorithm 1 to the letter. "released": what its authors' code does, and the
        better of the two where we measured them (docs/sequences.md). "relaxed": ours.
    statistic: the noise is ‖Δ_hist k‖² ("squared") or ‖Δ_hist k‖ ("norm"). two_sided: one far below the mean triggers too.
    warm_up: edits before the first that may be constrained. start_at: m begins as 0 ("zero") or as the first noise ("first").
    removed: at most this share of the d directions is taken away, the strongest. floor: eigenvalues up to this count as 0; at 0 what is
        0 but for rounding. with_noise: the directions of [Δ_hist Δ_histᵀ | Δ_hist k_e] instead.
    key: whether k_e is the "mean" key that is written with, or the "bare" prompt's.
    patience: so many constrained edits in a row, and m, v follow the noise all the same. None: the preset's; neither "paper" nor "released"
        has one: once the noise has left the band, m and v may stay behind for good and every further edit is constrained.
    strict: the residual of the last layer, which also carries what the lower layers missed, is made orthogonal too. Ours.
    retry: where p(target) under P_α stays below this, the value is found once more, freely. Ours. None: the preset's; 0: never.
    enough: see `Search`; None: the preset's, 1: never.
    """

    name: ClassVar[str] = "deltaedit"
    paper: ClassVar[str] = "DeltaEdit §4.2"
    together: ClassVar[bool] = False  # how a value is looked for depends on the session's history
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        family: {**values, "eta": {"gpt2-xl": 3.0, "llama-3-8b": 1.5, "llama-3.1-8b": 1.5}.get(family, 2.0)}
        for family, values in AlphaEdit.family_defaults.items()
    }

    eta: float | None = None
    xi: float = 0.9
    preset: Literal["paper", "released", "relaxed"] = "released"
    statistic: Literal["squared", "norm"] | None = None
    two_sided: bool | None = None
    warm_up: int | None = None
    start_at: Literal["zero", "first"] | None = None
    removed: float | None = None
    floor: float | None = None
    with_noise: bool | None = None
    key: Literal["mean", "bare"] | None = None
    patience: int | None = None
    strict: bool = False
    retry: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eta", "warm_up", "floor"):
            check_range(self.name, name, getattr(self, name), 0)
        check_range(self.name, "xi", self.xi, 0, 0.999999)
        check_range(self.name, "removed", self.removed, 0, 1, above=True)
        check_range(self.name, "patience", self.patience, 1)
        check_range(self.name, "retry", self.retry, 0, 1)

    def for_model(self, lm: LanguageModel) -> Self:
        """See `Locate.for_model`; the preset fills in the rest."""
        chosen = super().for_model(lm)
        preset = PRESETS[chosen.preset]
        return replace(chosen, **{f.name: preset[f.name] for f in fields(chosen) if f.name in preset and getattr(chosen, f.name) is None})

    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """See `Locate.session`."""
        return _Delta(lm, self, objective, seed)


class _Delta(AlphaSession):
    method: DeltaEdit

    def __init__(self, lm: LanguageModel, method: DeltaEdit, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        anatomy = lm.anatomy
        self.history = DeltaHistory(anatomy.hidden_size, anatomy.key_size, device=self.device)
        assert method.eta is not None and method.warm_up is not None and method.two_sided is not None  # for_model filled them in
        assert method.statistic is not None and method.start_at is not None
        self.threshold = Threshold(
            method.eta, method.xi, method.warm_up, method.statistic, method.two_sided, method.start_at, method.patience
        )
        # Of the edit that is being made: Û [d, r] of the facts that are held to it, which these are [F], how many were let off; the noise
        # ‖Δ_hist k_e‖² of each, and the threshold.
        self.directions: dict[int, Tensor] = {}
        self.bound = torch.zeros(0, dtype=torch.bool)
        self.retried = 0
        self.noise: list[float] = []
        self.limit = 0.0

    def values(self, sweep: Sweep | Reached, requests: list[Any]) -> Values:
        """δ at the last critical layer, under P_α for the facts whose noise is above the threshold."""
        assert isinstance(sweep, Sweep)  # one edit at a time
        method, last, base = self.method, self.layers[-1], sweep.reached
        contexts = sweep.before[last]
        keys = contexts[:, 0] if method.key == "bare" else self.key(contexts)  # k_e [F, d_in]
        noise = self.history.norm2(keys)
        self._refuse_runaway(noise)
        self.noise = noise.tolist()
        self.limit = self.threshold.band[1]
        self.bound = torch.tensor([self.threshold.triggered(noise) for noise in self.noise], device=base.device)
        self.retried, self.directions = 0, {}
        bound = self.bound.nonzero().squeeze(-1).tolist()
        if not bound:
            return find_values(self.lm, last, requests, base, method.search, self.objective)
        assert method.removed is not None  # for_model filled it in
        cap, floor = int(method.removed * base.shape[1]), method.floor or None
        noises = self.history.times(keys) if method.with_noise else [None] * len(keys)
        self.directions = {i: self.history.directions(cap, floor, noises[i]) for i in bound}
        found = find_values(self.lm, last, requests, base, method.search, self.objective, self._free_of_history)
        blocked = (self.bound & (found.probability < (method.retry or 0.0))).nonzero().squeeze(-1)
        if len(blocked):
            again = find_values(self.lm, last, [requests[i] for i in blocked.tolist()], base[blocked], method.search, self.objective)
            found.delta[blocked], found.probability[blocked] = again.delta, again.probability
            found.steps[blocked] += again.steps
            self.bound[blocked] = False
            self.retried = len(blocked)
        return found

    def _free_of_history(self, rows: Tensor, facts: Tensor) -> Tensor:
        """P_α (eq. 20) for those of the facts [A] that are bound, the others as they are. rows [A, d]."""
        free = rows.clone()
        for row, fact in enumerate(facts.tolist()):
            if bool(self.bound[fact]):
                free[row] = project_out(rows[row : row + 1], self.directions[fact])[0]
        return free

    def residual(self, index: int, residual: Tensor) -> Tensor:
        if self.method.strict and index == len(self.layers) - 1 and bool(self.bound.any()):
            return self._free_of_history(residual, torch.arange(len(residual), device=residual.device))
        return residual

    def remember(self, edit: Edit) -> None:
        super().remember(edit)
        written = edit.deltas[len(self.layers) - 1]  # at the last layer
        assert isinstance(written, LowRankDelta)
        self.history.add(written.left, written.right)
        for noise in edit.diagnostics["noise"]:
            self.threshold.update(noise)

    def diagnostics(self) -> dict[str, Any]:
        return super().diagnostics() | {
            "noise": self.noise,
            "history_noise": max(map(self.threshold.value, self.noise)),
            "threshold": self.limit,
            "constrained": int(self.bound.sum()),
            "retried": self.retried,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": self.history.state_dict(), "threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.history.load_state_dict(state["history"])
        self.threshold.load_state_dict(state["threshold"])
