"""The directions that ordinary keys hardly use: what is written there, ordinary text hardly feels (AlphaEdit, arXiv 2410.02355)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.statistics.errors import StatisticsError

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.statistics.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class NullSpace:
    """The orthogonal projector P = U Uᵀ on the span of C's eigenvectors U with small eigenvalues, never as a [d, d] matrix.

    basis: [d, r] orthonormal, r ≤ d/2: U itself, or where `complement` a basis of all else, and P = I − basis basisᵀ.
    dimensions: of the space. threshold: what its eigenvalues lie below; None where a share of dimensions was asked for.
    energy: trace(P C), the mean squared length of what ordinary keys have inside the space.
    """

    basis: Tensor
    complement: bool
    dimensions: int
    threshold: float | None
    energy: float

    @classmethod
    def of(cls, moment: Tensor, threshold: float | None = None, share: float | None = None) -> NullSpace:
        """The space of a moment C [d, d], decomposed in float64 on its device.

        threshold: eigenvalues below it span the space (the paper and its code: 2e-2; METHODS "AlphaEdit"). share: used where `threshold`
            is None: so many of the dimensions, 0 < share ≤ 1, rounded, those with the smallest eigenvalues.
        Raises StatisticsError for a matrix that is not square or not finite, and for an empty space.
        """
        width = _checked(moment)
        values, vectors = torch.linalg.eigh(moment.double())  # ascending
        if threshold is not None:
            dimensions = int((values < threshold).sum())
            if not dimensions:
                raise StatisticsError(
                    f"the null space is empty: no eigenvalue of C lies below the threshold {threshold:g}, the smallest is {values[0]:.3g}, "
                    f"the largest {values[-1]:.3g}; raise the threshold, or ask for a share of the dimensions (threshold=None, share=0.7)"
                )
        elif share is not None:
            if not 0 < share <= 1:
                raise StatisticsError(f"the share of dimensions must be above 0 and at most 1 (got {share})")
            dimensions = round(share * width)
            if not dimensions:
                raise StatisticsError(f"the null space is empty: a share of {share} of {width} dimensions is none; ask for a larger share")
        else:
            raise StatisticsError("a null space needs a threshold for the eigenvalues, or a share of the dimensions; give one of them")
        complement = 2 * dimensions > width
        basis = vectors[:, dimensions:] if complement else vectors[:, :dimensions]
        energy = max(float(values[:dimensions].sum()), 0.0)  # rounding makes eigenvalues of 0 negative
        return cls(basis.clone(memory_format=torch.contiguous_format), complement, dimensions, threshold, energy)

    @property
    def width(self) -> int:
        """d."""
        return len(self.basis)

    @property
    def share(self) -> float:
        """Of all dimensions."""
        return self.dimensions / self.width

    def project(self, x: Tensor) -> Tensor:
        """P x for every x [..., d], in the type and on the device of x: two products with [d, r]."""
        basis = self.basis.to(x.device, x.dtype)
        inside = (x @ basis) @ basis.T
        return x - inside if self.complement else inside

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NullSpace:
        """The same space with its basis elsewhere or in another type."""
        return replace(self, basis=self.basis.to(device=device, dtype=dtype))


def null_space_for(
    lm: LanguageModel, moments: Moments, layer: int, threshold: float | None = None, share: float | None = None
) -> NullSpace:
    """`NullSpace.of` a layer's moment, on the model's device where there is room, and only once: it hangs on the model.

    In float64, at d_in 14,336 the decomposition takes minutes on a CPU. Raises StatisticsError as `NullSpace.of` does, for another
    model's moments, and for a layer that is not in them.
    """
    moments.check(lm)
    memory: dict[Any, Any] = vars(lm.model).setdefault("errata_statistics", {})
    key = ("null space", moments.fingerprint, moments.pieces, moments.count, layer, threshold, share if threshold is None else None)
    space: NullSpace | None = memory.get(key)
    if space is None:
        moment = moments.mean(layer)
        device = torch.device("cpu") if lm.device.type == "mps" else lm.device  # Apple's devices know no float64
        try:
            space = NullSpace.of(moment.to(device), threshold, share)
        except torch.OutOfMemoryError:
            space = NullSpace.of(moment, threshold, share).to(device)
        memory[key] = space
    return space


def spectrum(moment: Tensor) -> Tensor:
    """The eigenvalues of C [d, d], ascending [d] float64. Raises StatisticsError for a matrix that is not square or not finite."""
    _checked(moment)
    values: Tensor = torch.linalg.eigvalsh(moment.double())
    return values


def _checked(moment: Tensor) -> int:
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise StatisticsError(f"a moment is a square matrix [d, d], this is {list(moment.shape)}; take Moments.mean(layer)")
    if not moment.isfinite().all():
        raise StatisticsError("the moment holds values that are not finite; collect the statistics with the model in bfloat16 or float32")
    return len(moment)
