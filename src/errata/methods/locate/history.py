"""DeltaEdit's memory of the value layer: what earlier edits added, which directions they wrote to, and when an edit must keep off them.

DeltaEdit (deltaedit.txt), §4.2 and Algorithm 1. Rows are facts: keys [F, d_in], values [F, d].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from errata.methods.locate.ridge import BLOCK, Rows


def project_out(x: Tensor, directions: Tensor) -> Tensor:
    """x − ÛÛᵀx for each row of x [F, d]; directions Û [d, r], orthonormal (eq. 20–21)."""
    u = directions.to(x)
    return x - (x @ u) @ u.T


class DeltaHistory:
    """Δ_hist = Σ αₑβₑᵀ [d, d_in] of the edits so far (eq. 17), and the space its columns span, without a decomposition for each edit.

    Δ_hist is kept as its factors until they would be larger than the matrix (r = d·d_in/(d + d_in) terms), as a matrix from there on, with
    later terms gathered by blocks of 32. At d = 4,096, d_in = 14,336 that break-even is r = 3,185: 3,000 edits take 0.44 GB as float64
    factors (up to half as much again is room to grow), any number of further edits 0.47 GB. The basis takes up to 0.13 GB, and so does
    Δ_hist Δ_histᵀ, which is summed up from the first edit on: begun when it is needed first, it would depend on what was asked, by its
    rounding, and a sequence that goes on could not come to the same bits. dtype=float32 halves all that and costs about half of the digits.

    The basis is that of the αₑ, grown by Gram-Schmidt. It is the column space of Δ_hist as long as the βₑ are independent; where they are
    not (the very same key edited twice) it is larger: it holds every αₑ, which is what the paper is after ("the set A").
    """

    def __init__(
        self, size: int, width: int, relative: float = 1e-6, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> None:
        """size: d, width: d_in. relative: what counts as zero. An α adds a direction if more than that share of its length lies outside the
        earlier ones; where singular values of Δ_hist are compared, those up to that share of the largest are zero.
        """
        self.size, self.width, self.relative = size, width, relative
        self._left, self._right = Rows(size, dtype, device), Rows(width, dtype, device)
        self._basis = Rows(size, dtype, device)
        self._dense: Tensor | None = None
        self._outer: Tensor | None = None  # D = Δ_hist Δ_histᵀ [d, d]
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """The number of directions that the edits have written to."""
        return len(self._basis)

    @property
    def nbytes(self) -> int:
        """Bytes that the history takes."""
        rest = (self._dense, self._outer, *(self._spectrum or ()))
        return self._left.nbytes + self._right.nbytes + self._basis.nbytes + sum(int(t.nbytes) for t in rest if t is not None)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Δ_hist ← Δ_hist + left @ right; left [d, F] holds the αs, right [F, d_in] the βs. Raises ValueError for other shapes."""
        if left.dim() != 2 or left.shape[0] != self.size or right.shape != (left.shape[1], self.width):
            expected = f"left [{self.size}, r] and right [r, {self.width}]"
            raise ValueError(f"an addition to the history must be {expected}, got {list(left.shape)} and {list(right.shape)}")
        alphas, betas = left.detach().T.to(self._left.tensor), right.detach().to(self._right.tensor)
        # D + Eαᵀ + αEᵀ + α(βᵀβ)αᵀ with E = Δβ, as X + Xᵀ: exactly symmetric
        half = (self.times(betas) + (betas @ betas.T) @ alphas / 2).T @ alphas
        self._outer = half + half.T if self._outer is None else self._outer.add_(half).add_(half.T)
        self._left.append(alphas)
        self._right.append(betas)
        self._spectrum = None
        for alpha in alphas:
            self._extend(alpha)
        even = self.size * self.width // (self.size + self.width)
        if len(self._left) >= (even if self._dense is None else BLOCK):
            self._fold()

    def times(self, keys: Tensor) -> Tensor:
        """Δ_hist k [F, d] for keys [F, d_in]."""
        keys = keys.detach().to(self._right.tensor)
        recent = (keys @ self._right.tensor.T) @ self._left.tensor
        return recent if self._dense is None else recent.addmm_(keys, self._dense.T)

    def norm2(self, keys: Tensor) -> Tensor:
        """‖Δ_hist k‖² [F] for keys [F, d_in]: the noise that the earlier edits cause there."""
        return self.times(keys).square().sum(-1)

    def directions(self, cap: int, absolute: float | None = None, noise: Tensor | None = None) -> Tensor:
        """Û [d, r], orthonormal: eigenvectors of D = Δ_hist Δ_histᵀ with non-zero eigenvalue, at most `cap`, the largest kept (eq. 18–20).

        Without `absolute` and `noise`, and up to `cap` directions, any basis of that space does: the one at hand is returned (a view, for
        reading). Otherwise one eigendecomposition, of the size of the rank; it is kept until the next `add`.
        absolute: only eigenvalues above it. noise [d]: singular vectors of [D | noise] instead
        (both as in the paper's released code). Raises ValueError if cap is negative.
        """
        if cap < 0:
            raise ValueError(f"at least 0 directions can be removed, got cap={cap}")
        basis = self._basis.tensor  # [r, d]
        if not len(basis) or (absolute is None and noise is None and len(basis) <= cap):
            return basis.T
        values, vectors = self._eigen() if noise is None else self._with_noise(noise)
        # the eigenvalues of D are squares of the singular values of Δ_hist, which is what `relative` speaks of
        zero = float(values[0]) * max(self.relative**2, torch.finfo(values.dtype).eps)
        limit = zero if absolute is None else max(absolute, zero)
        return basis.T @ vectors[:, : min(cap, int((values > limit).sum()))]

    def state_dict(self) -> dict[str, Any]:
        """Everything, for the sequence to go on bit for bit."""
        rows = {"left": self._left, "right": self._right, "basis": self._basis}
        single = {"dense": self._dense, "outer": self._outer}
        return {name: r.tensor.clone() for name, r in rows.items()} | {name: None if t is None else t.clone() for name, t in single.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError if it is of another shape."""
        shape = (state["left"].shape[1], state["right"].shape[1])
        if shape != (self.size, self.width):
            raise ValueError(f"this history is of a matrix {list(shape)}, this layer's is {[self.size, self.width]}")
        own = self._left.tensor
        for rows, name in ((self._left, "left"), (self._right, "right"), (self._basis, "basis")):
            rows.clear()
            rows.append(state[name].to(own))
        self._dense, self._outer = (None if state[name] is None else state[name].to(own, copy=True) for name in ("dense", "outer"))
        self._spectrum = None

    def _extend(self, alpha: Tensor) -> None:
        """One step of Gram-Schmidt, done twice: once leaves too little precision in what is nearly dependent."""
        size = float(alpha.norm())
        if size == 0 or len(self._basis) == self.size:
            return
        basis = self._basis.tensor
        rest = alpha / size
        for _ in range(2):
            rest = rest - (basis @ rest) @ basis
        length = float(rest.norm())
        if length > self.relative:
            self._basis.append((rest / length).unsqueeze(0))

    def _fold(self) -> None:
        left, right = self._left.tensor, self._right.tensor
        if self._dense is None:
            self._dense = left.T @ right
        else:
            self._dense.addmm_(left.T, right)
        self._left.clear()
        self._right.clear()

    def _inner(self) -> Tensor:
        """D in the basis [r, r]."""
        assert self._outer is not None  # there is no basis before the first edit
        basis = self._basis.tensor
        return basis @ self._outer @ basis.T

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of D [r], from the largest, and its eigenvectors in the basis [r, r]."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self._inner())
            self._spectrum = (values.flip(0), vectors.flip(1))
        return self._spectrum

    def _with_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values of [D | noise] and its left singular vectors in the basis; Δ_hist k lies in that space.

        From D² + n nᵀ, which takes half the time of a decomposition of [D | n]; what it loses lies far below the limits it is asked for.
        """
        inside, inner = self._basis.tensor @ noise.detach().to(self._basis.tensor), self._inner()
        squares, left = torch.linalg.eigh(torch.addr(inner @ inner, inside, inside))
        return squares.clamp(min=0).sqrt().flip(0), left.flip(1)


@dataclass(slots=True)
class Threshold:
    """Whether an edit's noise h = ‖Δ_hist k‖² is out of the ordinary (eq. 22–24, Algorithm 1): h > m + η√v.

    eta: η. decay: ξ, the paper's δ, of m ← ξm + (1−ξ)h and then v ← ξv + (1−ξ)(h − m)². warm_up: edits that never trigger; 5 is the paper's
    "the first 5 edits skip" (its e ≥ 5, counted from 0), 20 the released code's. statistic: h itself, or its root. two_sided: below m −
    η√v too. start: m = v = 0, or m = the first h that is not zero (the first edit has no history), v = 0; until then nothing triggers.
    patience: m and v learn from edits that do not trigger only ("in a reasonable range"), so once the noise has left the band for good they
    freeze and every edit triggers. After `patience` triggered edits in a row the new level counts as ordinary: m and v learn from the
    further ones as well, until one stays within the band. They learn from h as it is: clipped to the band it could not widen a band with v
    = 0 or η < 1/ξ. None: never, as published.
    """

    eta: float
    decay: float = 0.9
    warm_up: int = 5
    statistic: Literal["squared", "norm"] = "squared"
    two_sided: bool = False
    start: Literal["zero", "first"] = "zero"
    patience: int | None = None
    mean: float = field(default=0.0, init=False)
    variance: float = field(default=0.0, init=False)
    count: int = field(default=0, init=False)
    streak: int = field(default=0, init=False)
    started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.eta < 0 or not 0 <= self.decay < 1 or self.warm_up < 0 or (self.patience is not None and self.patience < 0):
            raise ValueError(f"eta, warm_up and patience must be at least 0 and decay in [0, 1), got {self}")
        if self.statistic not in ("squared", "norm") or self.start not in ("zero", "first"):
            raise ValueError(f"statistic is 'squared' or 'norm', start is 'zero' or 'first', got {self.statistic!r} and {self.start!r}")
        self.started = self.start == "zero"

    @property
    def band(self) -> tuple[float, float]:
        """m − η√v and m + η√v, in units of the statistic."""
        reach = self.eta * math.sqrt(self.variance)
        return self.mean - reach, self.mean + reach

    def triggered(self, h: float) -> bool:
        """Whether an edit with h = ‖Δ_hist k‖² must keep off the history's directions. Changes nothing.

        Raises ValueError if h is not finite.
        """
        value = self.value(h)
        if self.count < self.warm_up or not self.started:
            return False
        low, high = self.band
        return value > high or (self.two_sided and value < low)

    def update(self, h: float) -> None:
        """Count the edit with h = ‖Δ_hist k‖², once, after it was asked about; m and v learn from it as the rules above say."""
        outside, value = self.triggered(h), self.value(h)
        self.count += 1
        self.streak = self.streak + 1 if outside else 0
        if outside and (self.patience is None or self.streak <= self.patience):
            return
        if not self.started:
            self.mean, self.started = value, value > 0
            return
        self.mean = self.decay * self.mean + (1 - self.decay) * value
        self.variance = self.decay * self.variance + (1 - self.decay) * (value - self.mean) ** 2

    def state_dict(self) -> dict[str, Any]:
        """What was learnt; the parameters are not in it."""
        return {name: getattr(self, name) for name in _LEARNT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _LEARNT:
            setattr(self, name, state[name])

    def value(self, h: float) -> float:
        """The statistic of a noise h = ‖Δ_hist k‖². Raises ValueError if h is not finite."""
        if not (math.isfinite(h) and h >= 0):
            raise ValueError(f"the noise of the history must be a finite number, at least 0, got {h!r}: the earlier edits have run away")
        return math.sqrt(h) if self.statistic == "norm" else h


_LEARNT = ("mean", "variance", "count", "streak", "started")
