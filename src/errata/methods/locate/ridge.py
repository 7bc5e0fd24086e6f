"""The write rule of ROME, MEMIT, AlphaEdit and DeltaEdit: one ridge regression that remembers, without a dense solve for each edit.

All of them find Δ = Rᵀβ for keys K [F, d_in] and residuals R [F, d] (one row a fact), and differ only in what must not move:

    rule                 prior M₀ = A⁻¹                          slack   remembers its keys
    ROME                 inverse_prior(C), or identity_prior     0       no
    MEMIT                inverse_prior(C, λ): A = λC             1       no
    MEMIT with history   the same                                1       yes
    AlphaEdit, DeltaEdit null_space_prior(P, L2): P / L2         1       yes

With H the keys of earlier edits and M = (A + HHᵀ)⁻¹, Woodbury's identity gives for the current keys, as rows, G = KM:
    β = (slack·I + KGᵀ)⁻¹ G        and, once they are remembered,        M ← M − Gᵀ(I + KGᵀ)⁻¹G.
With slack 1 that is (A + HHᵀ + KᵀK) β = K, and with M₀ = P/L2 AlphaEdit's (P(HHᵀ + KᵀK) + L2·I) β = PK, for Pβ = β. With slack 0 it is the
Δ with ΔK = R exactly that is least in the metric A + HHᵀ: ROME's u/(uᵀk), u = C⁻¹k, for one fact.

With slack 1 and LLᵀ = I + KGᵀ that is M ← M − (Lᵀβ)ᵀ(Lᵀβ): β and the F numbers by F of L say all that is to be remembered of an edit, so
nobody has to keep its keys (`Ridge.solved`, `Ridge.recall`).
(arXiv 2202.05262, 2210.07229, 2410.02355; DeltaEdit, eq. 6, 8 and 10.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Prior = Callable[[Tensor], Tensor]
"""M₀ applied to rows: [F, d_in] -> [F, d_in]; symmetric and positive semi-definite."""

BLOCK = 32
"""How many remembered keys gather before they are subtracted from a dense M together: one pass over it instead of 32."""
EVEN = 2048
"""Up to this width M is dense from the first remembered key: it is soon made, takes at most 32 MiB, and every edit costs the same."""


def identity_prior(keys: Tensor) -> Tensor:
    """M₀ = I: ROME with its moments switched off."""
    return keys


def inverse_prior(moment: Tensor, weight: float = 1.0, jitter: float = 1e-8) -> Prior:
    """M₀ = (weight · (moment + jitter · mean diagonal · I))⁻¹, by one Cholesky factor in float64 (d_in³/3 operations, once a layer).

    The jitter is there because rarely used ReLU units, and corpora shorter than d_in, leave the moments singular; it puts a ceiling on how
    freely the directions that the corpus never used are written to. moment: C [d_in, d_in].
    Raises ValueError if the moments are not positive semi-definite, or are all zero.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"second moments must be a square matrix, got {list(moment.shape)}")
    if not weight > 0:
        raise ValueError(f"the weight of the second moments must be above 0, got {weight!r}")
    regular = moment.double().clone()
    regular.diagonal().add_(jitter * regular.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(regular.mul_(weight))
    if int(failed):
        raise ValueError("the second moments are not positive semi-definite; collect them in float64, from ordinary text")
    upper = factor.T

    def apply(keys: Tensor) -> Tensor:
        # two triangular solves: torch.cholesky_solve takes ten times as long for a few right-hand sides
        half = torch.linalg.solve_triangular(factor, keys.to(factor).T, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(upper, half, upper=True).T
        return solved.to(keys)

    return apply


def null_space_prior(project: Prior, l2: float) -> Prior:
    """M₀ = P / L2 (AlphaEdit). project: rows -> their orthogonal projections. Raises ValueError unless L2 > 0."""
    if not l2 > 0:
        raise ValueError(f"L2 must be above 0, got {l2!r}; for the equality constraint use slack = 0")
    return lambda keys: project(keys) / l2


class Rows:
    """A matrix that grows by rows, in a buffer with room to spare: no copy of the whole for each addition."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        self._buffer = torch.empty(0, width, dtype=dtype, device=device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def tensor(self) -> Tensor:
        """[n, width], a view: later additions leave it as it is."""
        return self._buffer[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, its spare room with it."""
        return int(self._buffer.nbytes)

    def append(self, rows: Tensor) -> None:
        """Add rows [F, width]."""
        needed = self._count + len(rows)
        if needed > len(self._buffer):
            larger = self._buffer.new_empty(max(needed, len(self._buffer) * 3 // 2 + 16), self._buffer.shape[1])
            larger[: self._count] = self.tensor
            self._buffer = larger
        self._buffer[self._count : needed] = rows
        self._count = needed

    def clear(self) -> None:
        """Forget the rows, and the room they took."""
        self._buffer, self._count = self._buffer[:0].clone(), 0


class Ridge:
    """β with (A + HHᵀ + KᵀK) β = K (slack 1), or the equality ΔK = R in the metric A + HHᵀ (slack 0); see the module.

    M is prior − VᵀV, V [T, d_in] for T remembered keys: 2·T·d_in numbers are read for each solve, T·d_in are kept. When T reaches `fold_at`
    M becomes dense, [d_in, d_in], and time and memory stop growing; later keys gather in V by blocks of 32. Becoming dense costs about
    3·d_in³ operations, once, and nothing else here is of that order. By default that is with the first key up to d_in = `EVEN`, for an
    even cost from the first edit to the last; above, at d_in / 2, where V costs as much as one pass over a dense matrix and half its
    memory. A number no run reaches: never dense.

    dtype: float64. What the history leaves of M is a difference of numbers as large as the prior, so β errs, relatively, by about
    eps · kᵀM₀k · (how often k came back), where a dense solve does not. After 5,000 keys of width 112, against dense solves refined in
    extended precision: 2e-11 in the null space; over moments as ill-conditioned as the jitter allows 1e-7 for fresh keys, and from 2e-6
    (weight 100) to 2e-4 (weight 1) when 40 keys come back 125 times each. Once T is many times d_in the dense form loses less than the
    low-rank one (1e-8 against 2e-5 at worst). float32 keeps 2e-4 or better in the null space; over such moments it is of no use (see
    `solve`).
    """

    def __init__(
        self,
        prior: Prior,
        width: int,
        slack: float = 1.0,
        fold_at: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises ValueError if slack or fold_at is negative."""
        if slack < 0 or (fold_at is not None and fold_at < 0):
            raise ValueError(f"slack and fold_at must be at least 0, got {slack!r} and {fold_at!r}")
        self.prior = prior
        self.width = width
        self.slack = slack
        self.fold_at = fold_at if fold_at is not None else 0 if width <= EVEN else width // 2
        self.count = 0
        self._recent = Rows(width, dtype, device)  # V
        self._dense: Tensor | None = None
        self._solved: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of the last solve: K, G, L and L⁻¹G

    @property
    def folded(self) -> bool:
        """Whether M is dense by now."""
        return self._dense is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the history takes; the prior's own are not counted."""
        return self._recent.nbytes + (0 if self._dense is None else int(self._dense.nbytes))

    def solve(self, keys: Tensor) -> Tensor:
        """β [F, d_in] for keys [F, d_in]; Δ = Rᵀβ. The history stays as it is.

        Raises ValueError if the keys are not finite or not [F, d_in]; and, for slack 0, if they are linearly dependent in the metric (the
        same subject twice in one batch), or invisible to the prior: then no Δ gives each its own value. Raises ArithmeticError if rounding
        has used up the precision of the history.
        """
        keys = self._checked(keys)
        g = self._apply(keys)
        factor = self._factor(keys, g, self.slack)
        half = torch.linalg.solve_triangular(factor, g, upper=False)  # L⁻¹G
        self._solved = (keys.clone(), g, factor, half)
        beta: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
        return beta

    def remember(self, keys: Tensor) -> None:
        """Put keys [F, d_in] into H. Right after `solve` with the same keys this costs next to nothing."""
        keys = self._checked(keys)
        if self._solved is not None and torch.equal(self._solved[0], keys):
            _, g, _, half = self._solved
        else:
            g, half = self._apply(keys), None
        if half is None or self.slack != 1:
            half = torch.linalg.solve_triangular(self._factor(keys, g, 1.0), g, upper=False)
        self._append(half)

    def solved(self, beta: Tensor, within: float) -> Tensor | None:
        """L [F, F] of the last `solve`, from which `recall` goes on with β as it is kept [F, d_in], rounded perhaps.

        None where M could be off by more than this share of itself, as keys like these see it: with e what Lᵀβ is off by, that is
        ‖M^-½ (VᵀV)′ M^-½‖ ≤ 2 ‖L‖ ‖K‖ ‖e‖, since ‖V M^-½‖ ≤ ‖L‖ and ‖e M^-½‖ is about ‖e Kᵀ‖ (M taken with the keys in it).
        """
        assert self._solved is not None, "there was no solve"
        keys, _, factor, half = self._solved
        off = 2 * factor.norm() * keys.norm() * (self._half(beta, factor) - half).norm()
        return factor if float(off) < within else None

    def recall(self, beta: Tensor, factor: Tensor) -> None:
        """`remember`, from what `solve` and `solved` gave for keys while exactly the history of now was there; for slack 1.

        β [F, d_in], L [F, F]; the same bits for the same values, however they lie in memory.
        """
        self._append(self._half(beta, factor))

    def _half(self, beta: Tensor, factor: Tensor) -> Tensor:
        """Lᵀβ, which is L⁻¹G."""
        factor, beta = (part.detach().to(self._recent.tensor).clone(memory_format=torch.contiguous_format) for part in (factor, beta))
        return factor.T @ beta

    def _append(self, half: Tensor) -> None:
        self._solved = None
        self._recent.append(half)
        self.count += len(half)
        if len(self._recent) >= (self.fold_at if self._dense is None else BLOCK):
            self._fold()

    def state_dict(self) -> dict[str, Any]:
        """The history; the prior is not in it."""
        dense = None if self._dense is None else self._dense.clone()
        return {"count": self.count, "recent": self._recent.tensor.clone(), "dense": dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, bit for bit, over the same prior. Raises ValueError if it is of another width."""
        recent, dense = state["recent"], state["dense"]
        if recent.shape[1] != self.width:
            raise ValueError(f"this history is for keys of width {recent.shape[1]}, this layer's have {self.width}")
        own = self._recent.tensor
        self._recent.clear()
        self._recent.append(recent.to(own))
        self._dense = None if dense is None else dense.to(own, copy=True)
        self.count, self._solved = int(state["count"]), None

    def _checked(self, keys: Tensor) -> Tensor:
        if keys.dim() != 2 or keys.shape[1] != self.width:
            raise ValueError(f"keys must be [facts, {self.width}], one row a fact, got {list(keys.shape)}")
        keys = keys.detach().to(self._recent.tensor)
        if not bool(keys.isfinite().all()):
            raise ValueError("keys must be finite; the model at hand gives NaN or infinity at the subject")
        return keys

    def _apply(self, keys: Tensor) -> Tensor:
        """G = KM [F, d_in]."""
        g = self.prior(keys) if self._dense is None else keys @ self._dense
        if not len(self._recent):
            return g
        v = self._recent.tensor
        return torch.addmm(g, keys @ v.T, v, alpha=-1)

    def _factor(self, keys: Tensor, g: Tensor, slack: float) -> Tensor:
        """Lower Cholesky factor of slack·I + KGᵀ [F, F]."""
        gram = keys @ g.T
        gram.diagonal().add_(slack)
        sizes = gram.diagonal().clamp(min=0).sqrt()  # so that keys of unlike sizes are judged by their directions
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram / torch.outer(sizes, sizes))
        if slack == 0:
            # the square of the sine between each key and the earlier ones; Δ errs by eps over that, so half of the digits are the limit
            sine2 = factor.diagonal().square()
            if int(failed) or bool((sine2 < torch.finfo(gram.dtype).eps ** 0.5).any()):
                raise ValueError(self._dependent(gram))
        elif int(failed):
            raise ArithmeticError(
                f"after {self.count} keys the history is no longer positive definite in {gram.dtype}; "
                "use float64, or a stronger prior (a larger L2 or weight)"
            )
        return factor * sizes.unsqueeze(-1)

    @staticmethod
    def _dependent(gram: Tensor) -> str:
        size = gram.diagonal().abs().sqrt()
        if bool((gram.diagonal() <= 0).any()):
            fact = int(gram.diagonal().argmin())
            return f"fact {fact} of the batch has a key that the prior maps to zero: no change of the weights reaches it"
        alike = (gram / torch.outer(size, size)).abs().tril(-1)
        one, other = divmod(int(alike.argmax()), len(gram))
        return (
            f"the keys of a batch under an equality constraint must be independent; those of facts {other} and {one} are the closest "
            "(the same subject twice?). Write them one after the other, or use a rule with slack, such as MEMIT"
        )

    def _fold(self) -> None:
        """M ← M − VᵀV, dense from now on."""
        v = self._recent.tensor
        if self._dense is None:
            self._dense = torch.empty(self.width, self.width, dtype=v.dtype, device=v.device)
            for start in range(0, self.width, 512):  # by blocks: the prior's own temporaries stay small
                rows = self._dense[start : start + 512]
                rows.zero_().diagonal(start).fill_(1)
                rows.copy_(self.prior(rows))
        self._dense.addmm_(v.T, v, alpha=-1)
        self._recent.clear()
