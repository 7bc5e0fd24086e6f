"""OVERTONE: a token-level training target that stops over-fitting (paper "OVERTONE", §3, eq. 2-3, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from errata.objectives.base import Objective, ObjectiveValue, Reduction, check_inputs, check_reduction, reduce_tokens, working_dtype


class Target(NamedTuple):
    """π_tar without its own [B, T, V] tensor: scale · kept off the target token, at_y on it. It is never differentiated."""

    kept: Tensor  # [B, T, V], the probabilities that pass the filter, not renormalised, 0 elsewhere
    mass: Tensor  # [B, T, 1], their sum Z
    scale: Tensor  # [B, T, 1], (1 − λ) / Z, or 0 where the mix is skipped
    at_y: Tensor  # [B, T, 1]


@dataclass(frozen=True)
class Overtone(Objective):
    """Σ_i max(KL(π_tar,i ‖ π_θ,i), ε): pull the target token up, but not beyond a mix with what the model itself believes.

    With logits s of one target token y, π = softmax(s), σ = std(s) over the vocabulary:
        π_flt   = softmax of the logits above s_max − n σ (the largest always stays)
        π_can   = λ δ_y + (1 − λ) π_flt
        π_tar   = π_can if y is its arg-max, else δ_y          (eq. 3)
    π_tar is a constant of the step. A token whose KL is at most ε counts ε and has gradient zero: it is no longer active.

    epsilon: token-level stopping threshold ε ≥ 0, in nats. The paper uses 0.01 for FT-M and 0.05 for LoRA, MELO and WISE.
    n_sigma: width n ≥ 0 of the filter, in standard deviations (torch's, with V − 1) of the logits.
    lam: weight λ in [0, 1] of the target token in the mix. ε = 0 and λ = 1 give cross-entropy (Prop. 3.1).
    coast: an edit whose tokens are all clipped is not finished: Adam's momentum carries it on to the method's last step, as in
        Algorithm 1, which has no stop (SGD has no momentum and stays where it is). Off, it ends there.
    reduction: "sum" over the tokens of an edit (the paper), or "mean" (the toolkits, where ε was tuned).
    clip, dynamic, check, filter: the paper's ablations (Table 3), each off with False: no clip (ε = 0); π_flt from the unedited
        model, given as `reference`; always mix; unfiltered π in the place of π_flt.
    """

    name: ClassVar[str] = "overtone"
    epsilon: float = 0.05
    n_sigma: float = 0.5
    lam: float = 0.1
    reduction: Reduction = "sum"
    clip: bool = True
    dynamic: bool = True
    check: bool = True
    filter: bool = True
    coast: bool = False

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        for name, value, high in (("epsilon", self.epsilon, math.inf), ("n_sigma", self.n_sigma, math.inf), ("lam", self.lam, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high or math.isinf(value):
                raise ValueError(f"{name} must be a finite number from 0 {'to 1' if high == 1 else 'up'}, got {value!r}")
        for name in ("coast", "clip", "dynamic", "check", "filter"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @property
    def needs_reference(self) -> bool:
        """True in the static ablation (`dynamic=False`)."""
        return not self.dynamic

    @property
    def threshold(self) -> float:
        """ε, or 0 where nothing is clipped."""
        return self.epsilon if self.clip else 0.0

    def evaluate(self, logits: Tensor, targets: Tensor, mask: Tensor, reference: Tensor | None = None) -> ObjectiveValue:
        """See `Objective.evaluate`. Work and memory are O(V) a token: one softmax and one more tensor of that size at a time."""
        check_inputs(logits, targets, mask)
        y = targets.masked_fill(~mask, 0).unsqueeze(-1)  # [B, T, 1]
        if self.dynamic:
            loss, active = _DynamicKL.apply(logits, y, mask, self)  # type: ignore[no-untyped-call]
        elif reference is None:
            raise ValueError("dynamic=False needs `reference`: the unedited model's logits at the same target positions")
        elif reference.shape != logits.shape:
            raise ValueError(f"reference must have the shape of the logits, {list(logits.shape)}, got {list(reference.shape)}")
        else:
            loss, active = self._static_kl(logits, y, mask, reference)
        return ObjectiveValue(reduce_tokens(loss, mask, self.reduction), active, self.coast)

    def target(self, logits: Tensor, y: Tensor, pi: Tensor) -> Target:
        """π_tar (eq. 3) of logits [B, T, V] with softmax `pi` in the working dtype; y [B, T, 1]. Call it without gradient.

        Whether y is the arg-max of π_can needs no second search of the vocabulary: the others' largest entry is (1 − λ) π_flt of the
        largest logit, unless that is y's own, and then y wins anyway.
        """
        top = pi.amax(-1, keepdim=True)
        if self.filter:  # on centred logits, in one buffer; torch.std takes ten times as long as its two lines here
            kept = logits - logits.mean(-1, keepdim=True, dtype=pi.dtype)  # [B, T, V]
            sigma = torch.linalg.vector_norm(kept, dim=-1, keepdim=True) / math.sqrt(max(logits.shape[-1] - 1, 1))
            peak = kept.amax(-1, keepdim=True)
            below = torch.nextafter(peak, torch.full_like(peak, -math.inf))  # the largest stays, also where n σ rounds to nothing
            kept.gt_(torch.minimum(peak - self.n_sigma * sigma, below)).mul_(pi)
        else:
            kept = pi
        mass = kept.sum(-1, keepdim=True)
        mixed = self.lam + (1 - self.lam) * kept.gather(-1, y) / mass
        accept = mixed >= (1 - self.lam) * top / mass if self.check else torch.ones_like(mixed, dtype=torch.bool)
        return Target(kept, mass, torch.where(accept, (1 - self.lam) / mass, 0.0), torch.where(accept, mixed, 1.0))

    def _clipped(self, kl: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """max(KL, ε) on the mask and 0 off it, and the tokens with KL > ε. Nothing is ever clipped at ε = 0."""
        active = mask & (kl > self.threshold) if self.threshold > 0 else mask
        return torch.where(active, kl, self.threshold).masked_fill(~mask, 0), active

    def _static_kl(self, logits: Tensor, y: Tensor, mask: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """The ablation: π_tar is not a multiple of π_θ any more, so the KL is summed over the vocabulary as it stands."""
        dtype = working_dtype(logits)
        with torch.no_grad():
            target = self.target(reference, y, torch.softmax(reference, -1, dtype=dtype))
            tar = (target.scale * target.kept).scatter_(-1, y, target.at_y)  # [B, T, V]
        kl = torch.xlogy(tar, tar).sum(-1) - torch.linalg.vecdot(tar, torch.log_softmax(logits, -1, dtype=dtype))
        return self._clipped(kl, mask)


class _DynamicKL(torch.autograd.Function):
    """Clipped KL [B, T] and active tokens [B, T], with the exact gradient π_θ − π_tar where active and 0 elsewhere.

    Off the target token π_tar is π_θ times a number or zero, log(π_tar/π_θ) is log(scale) or nothing, and the sum over the vocabulary
    in the KL collapses:  KL = (Z − kept_y) scale log(scale) + π_tar(y) (log π_tar(y) − log π_θ(y)).
    The gradient is formed in the place of the softmax, and is the only tensor of vocabulary size that is saved.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, mask: Tensor, objective: Overtone) -> tuple[Tensor, Tensor]:
        pi = torch.softmax(logits, -1, dtype=working_dtype(logits))  # [B, T, V]
        peak, pi_y = logits.amax(-1, keepdim=True), pi.gather(-1, y)
        log_pi_y = logits.gather(-1, y).to(pi.dtype) - peak + pi.amax(-1, keepdim=True).log()  # safe where pi_y underflows
        kept, mass, scale, at_y = objective.target(logits, y, pi)
        rest = scale * (mass - kept.gather(-1, y))
        kl = torch.xlogy(rest, scale) + torch.xlogy(at_y, at_y) - at_y * log_pi_y  # [B, T, 1]
        loss, active = objective._clipped(kl.squeeze(-1).clamp_(min=0), mask)
        ctx.mark_non_differentiable(active)
        if ctx.needs_input_grad[0]:
            gradient = pi.addcmul_(kept, scale, value=-1).scatter_(-1, y, pi_y - at_y)
            ctx.save_for_backward(gradient.to(logits.dtype), active)
        return loss, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, active = ctx.saved_tensors
        return gradient * (grad_loss * active).unsqueeze(-1).to(gradient.dtype), None, None, None
