"""Second moments of keys, C = E[k kᵀ]: which directions of a projection's input ordinary text uses, and how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.capture import capture
from errata.lm.resume import states_at
from errata.lm.tokens import Batch, encode

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


def second_moments(lm: LanguageModel, texts: Iterable[str], layers: Sequence[int], batch_size: int = 64) -> Mapping[int, Tensor]:
    """Layer -> C [d_in, d_in] float64: the mean of k kᵀ over every token of `texts`, k the input of the layer's MLP down-projection.

    Summed in float64, all layers in one pass. Raises ValueError if the texts hold no tokens.
    """
    paths = {str(layer): lm.anatomy.mlp_down[layer] for layer in layers}
    sums = {layer: torch.zeros(lm.anatomy.key_size, lm.anatomy.key_size, dtype=torch.float64) for layer in layers}
    count = 0
    encoded = (encode(lm.tokenizer, text) for text in texts if text.strip())
    while drawn := list(islice(encoded, 16 * batch_size)):
        drawn.sort(key=lambda e: len(e.ids))  # neighbours of like length waste little padding
        for start in range(0, len(drawn), batch_size):
            batch = lm.batch(drawn[start : start + batch_size])
            with capture(lm.model, paths, inputs=True) as keys:
                _run_up_to(lm, batch, max(layers))
            real = batch.attention_mask.bool()
            for layer in layers:
                k = keys[str(layer)][real].double()  # [N, d_in]
                sums[layer].addmm_(k.T.cpu(), k.cpu())
            count += int(real.sum())
    if not count:
        raise ValueError("the texts hold no tokens; give some ordinary text, about ten times as many tokens as the projection is wide")
    return {layer: total / count for layer, total in sums.items()}


@torch.no_grad()
def _run_up_to(lm: LanguageModel, batch: Batch, layer: int) -> None:
    """Run the layers up to and with `layer`, and no head."""
    if layer + 1 < len(lm.anatomy.layers):
        states_at(lm, batch, layer + 1)
    else:
        lm.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
