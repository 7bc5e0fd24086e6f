"""Adam on a dense change that never meets any but the same few keys, which spares most of what Adam remembers.

With K [N, d_in] the keys and G [N, d] the gradient in what the change Δ [d, d_in] makes of them, K Δᵀ:

    ∂L/∂Δ = Gᵀ K,      m = Ḡᵀ K,      first step:  Δ = -lr g / (|g| + ε)

The first moment m is a product like the gradient, of the running mean Ḡ of the Gs, and needs no matrix of its own; the second, which is
none, is needed by a second step only. So an edit that takes one step holds nothing but its change, another one that and one moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of torch.optim.Adam, whose steps these are, up to rounding (Kingma and Ba 2015, algorithm 1)."""


class OnKeys:
    """One change in optimisation, zero at first. keys: [F, T, d_in], those of F texts."""

    def __init__(self, keys: Tensor, width: int) -> None:
        """width: d."""
        self._keys, self._width = keys, width
        self._value: Tensor | None = None
        self._mean: Tensor | None = None  # Ḡ [F, T, d]
        self._square: Tensor | None = None  # the second moment [d, d_in], behind the second step
        self._steps = 0

    @property
    def value(self) -> Tensor:
        """Δ [d, d_in]."""
        if self._value is None:
            self._value = self._keys.new_zeros(self._width, self._keys.shape[-1])
        return self._value

    @torch.no_grad()
    def made(self) -> Tensor:
        """What the change makes of the keys [F, T, d]."""
        if self._value is None:
            return self._keys.new_zeros(*self._keys.shape[:2], self._width)
        return self._keys @ self._value.T

    @torch.no_grad()
    def step(self, felt: Tensor, lr: float) -> None:
        """One step of Adam down G, here `felt` [F, T, d]: the gradient in what the change makes of the keys. lr: of this step."""
        self._steps += 1
        (one, two), gradient = BETAS, self._product(felt)
        if self._mean is None:
            self._mean = felt * (1 - one)
            self._value = gradient.div_(gradient.abs().add_(EPSILON)).mul_(-lr)
            return
        if self._square is None:  # of the first step, whose gradient the mean still holds
            self._square = self._product(self._mean / (1 - one)).square_().mul_(1 - two)
        self._mean = self._mean.lerp(felt, 1 - one)
        self._square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        size = torch.div(self._square, 1 - two**self._steps, out=gradient).sqrt_().add_(EPSILON)
        self.value.addcdiv_(self._product(self._mean), size, value=-lr / (1 - one**self._steps))

    def cut(self, tokens: int) -> None:
        """Go on without what stands behind so many tokens of each text, which must be padding."""
        self._keys = self._keys[:, :tokens]
        self._mean = None if self._mean is None else self._mean[:, :tokens]

    def _product(self, felt: Tensor) -> Tensor:
        """[F, T, d] -> feltᵀ K [d, d_in]."""
        return felt.flatten(0, 1).T @ self._keys.flatten(0, 1)
