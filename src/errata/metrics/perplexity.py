"""Perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import fmean

import torch

from errata.lm import Encoded, LanguageModel, encode

TEXTS, TOKENS, ROWS = 16, 128, 4
"""Texts, tokens of each, and how many go through the model at once."""


def held_out(lm: LanguageModel, source: Iterable[str], count: int = TEXTS, tokens: int = TOKENS) -> list[Encoded]:
    """The beginnings of the first texts, as tokens; without those of a single token, which predict nothing."""
    read = (encode(lm.tokenizer, text).ids[:tokens] for text in islice(source, count))
    return [Encoded(ids, 1) for ids in read if len(ids) > 1]


@torch.no_grad()
def perplexity(lm: LanguageModel, texts: Sequence[Encoded]) -> float:
    """exp of the mean −log p over all tokens of the texts but their first; 1 without texts."""
    losses: list[float] = []
    for start in range(0, len(texts), ROWS):
        batch = lm.batch(texts[start : start + ROWS])
        logits = lm.target_logits(batch)
        losses += torch.nn.functional.cross_entropy(logits[batch.mask].float(), batch.targets[batch.mask], reduction="none").tolist()
    return math.exp(min(fmean(losses), 700.0)) if losses else 1.0
