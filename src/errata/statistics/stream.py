"""Text through the lower layers of a model, and the products of its keys into sums that can stop and go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.capture import capture
from errata.lm.resume import run_to
from errata.lm.tokens import Encoded, encode
from errata.statistics.errors import StatisticsError

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

LONGEST = 512
"""Tokens of one text: later ones are left out, so that one long article does not outweigh many short ones."""
BATCH_TOKENS = 4096
"""Of one forward pass, padding included. Captured keys of five layers of 14,336 are then 1.2 GB in float32."""
CHARACTERS_PER_TOKEN = 32
"""More than a token of running text ever has; what lies behind LONGEST times as many need not be tokenised to be left out."""


@dataclass(slots=True)
class Running:
    """How far a collection is. Whole only between chunks, which is where it may be written down.

    sums: layer -> sum of k kᵀ [d_in, d_in] float64, on the CPU. count: tokens in them.
    drawn: texts taken from the corpus. chain: a digest of these texts, each one hashed with the digest of those before it.
    """

    sums: dict[int, Tensor]
    count: int = 0
    drawn: int = 0
    chain: str = ""

    @classmethod
    def zero(cls, lm: LanguageModel, layers: Sequence[int]) -> Running:
        """The beginning. At d_in 14,336 each layer takes 1.6 GB of memory."""
        width = lm.anatomy.key_size
        return cls({layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers})

    def link(self, text: str) -> None:
        """One more text is taken from the corpus."""
        self.chain = hashlib.sha256(f"{self.chain}\n{text}".encode("utf-8", errors="surrogatepass")).hexdigest()
        self.drawn += 1

    def check_finite(self) -> None:
        """Raises StatisticsError naming a layer whose keys overflow."""
        for layer, total in self.sums.items():
            if not total.diagonal().isfinite().all():
                raise StatisticsError(
                    f"the keys of layer {layer} are not finite; load the model in bfloat16 or float32 in place of float16"
                )


def advance(lm: LanguageModel, texts: Iterable[str], running: Running, target: int | None, batch_size: int) -> Iterator[bool]:
    """Add the texts behind those that `running` has drawn, until it counts exactly `target` tokens or the texts end.

    Yields after every batch: True where a chunk ends and `running` is whole. Where chunks begin and end depends on texts, `target`
    and `batch_size` alone, so a collection that is stopped and gone on with makes the same sums as one that is not, bit for bit.
    Raises StatisticsError if the texts that were drawn before are others now.
    """
    stream = iter(texts)
    again = Running({})
    for _, text in zip(range(running.drawn), stream, strict=False):  # this way round: the other would draw one text more
        again.link(text)
    if again.chain != running.chain:
        raise StatisticsError(
            f"the first {running.drawn} texts are not those that the collection began with; give the same corpus, or begin anew"
        )
    while target is None or running.count < target:
        before = running.drawn
        chunk = _draw(lm, stream, running, None if target is None else target - running.count, batch_size)
        if running.drawn == before:
            return
        for batch in _batches(chunk, batch_size):
            _add(lm, batch, running)
            yield False
        running.check_finite()
        yield True


def _draw(lm: LanguageModel, stream: Iterator[str], running: Running, room: int | None, batch_size: int) -> list[Encoded]:
    """The next texts as tokens: some batches' worth, at most `room` tokens."""
    window = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    longest = min(LONGEST, window)
    enough = batch_size * LONGEST if room is None else min(batch_size * LONGEST, room)
    drawn: list[Encoded] = []
    tokens = 0
    for text in stream:
        running.link(text)
        if text.strip():
            ids = encode(lm.tokenizer, text[: longest * CHARACTERS_PER_TOKEN]).ids[:longest]
            ids = ids[: enough - tokens] if enough == room else ids
            drawn.append(Encoded(ids, len(ids)))
            tokens += len(ids)
        if tokens >= enough or len(drawn) >= 16 * batch_size:
            break
    return drawn


def _batches(chunk: list[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    """Neighbours of like length, which waste little padding."""
    batch: list[Encoded] = []
    for encoded in sorted(chunk, key=lambda e: len(e.ids)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(encoded.ids) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(encoded)
    if batch:
        yield batch


def _add(lm: LanguageModel, encoded: list[Encoded], running: Running) -> None:
    layers = list(running.sums)
    batch = lm.batch(encoded)
    with capture(lm.model, {str(layer): lm.anatomy.mlp_down[layer] for layer in layers}, inputs=True) as keys:
        run_to(lm, batch, max(layers))
    real = batch.attention_mask.bool().flatten()
    for layer in layers:
        flat = keys.pop(str(layer)).flatten(0, -2)  # OPT's MLP is given [B·T, d_in] in the first place
        k = flat[real.to(flat.device)]  # [N, d_in]
        if k.device.type in ("cpu", "mps"):  # Apple's devices know no float64
            k = k.cpu().double()
            running.sums[layer].addmm_(k.T, k)
        else:
            k = k.double()
            running.sums[layer].add_((k.T @ k).cpu())
    running.count += sum(len(e.ids) for e in encoded)
