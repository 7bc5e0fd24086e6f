"""Sampling on top of greedy decoding, so that what a text becomes does not depend on the texts beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Sampling(LogitsProcessor):
    """Adds noise to the logits, under which their arg-max is a sample of softmax(logits / T).

    argmax_v (logits_v / T + g_v), with g_v = -log e_v and e_v ~ Exp(1), independent: the Gumbel-max trick. Each text of the batch draws
    from a generator of its own, so a text with the same seed is the same text in every batch (up to the rounding of its logits).

    temperature: T > 0. seeds: one for each of the B texts.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack([self._exponential(generator, scores.shape[-1]) for generator in self.generators])  # [B, V]
        return scores.double() / self.temperature - noise.to(scores.device).log()

    @staticmethod
    def _exponential(generator: torch.Generator, size: int) -> Tensor:
        """In double precision: among a hundred thousand tokens a single one often draws 0, which would be taken whatever its logit."""
        return torch.empty(size, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
