"""Causal tracing: which states carry a fact (Meng et al. 2022, "ROME", §2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.facts import Fact
from errata.lm.capture import add_to_output, capture, first, submodule, with_first
from errata.lm.tokens import Batch, encode

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

PLACES = ("first subject token", "last subject token", "token after the subject", "last prompt token")


@dataclass(frozen=True, slots=True)
class Trace:
    """Mean over facts of p(first target token).

    clean, corrupted: without and with noise on the subject's embeddings, nothing restored.
    restored [layers, places]: with the layer's output at that place put back to its clean value (see `PLACES`).
    """

    clean: float
    corrupted: float
    restored: Tensor


@torch.no_grad()
def trace(lm: LanguageModel, facts: Sequence[Fact], noise: float = 3.0, samples: int = 3, seed: int = 0) -> Trace:
    """Corrupt the subject, restore one state, and see how much of the answer comes back.

    noise: standard deviation of what is added to the subject's embeddings, in standard deviations of all embeddings (the paper: 3).
    Each fact's target must be what the model says. Raises FactError if a fact names no subject.
    """
    encoded, spans = [], []
    for fact in facts:
        start, end = fact.subject_span
        encoded.append(encode(lm.tokenizer, fact.text, fact.target, (start, end)))
        last = encoded[-1].subject_last
        # The first token: of the prefixes' subject's last tokens, the one that covers its first character.
        begin = encode(lm.tokenizer, fact.text, fact.target, (start, start + 1)).subject_last
        assert last is not None and begin is not None
        spans.append((begin, last, min(last + 1, encoded[-1].prompt_length - 1), encoded[-1].prompt_length - 1))
    batch = lm.batch(encoded)
    places = torch.tensor(spans, device=lm.device)  # [B, 4]
    layers = {str(i): path for i, path in enumerate(lm.anatomy.layers)}
    with capture(lm.model, layers) as clean_states:
        clean = _answer(lm, batch)
    states = {name: state.clone() for name, state in clean_states.items()}

    columns = torch.arange(batch.input_ids.shape[1], device=lm.device)
    inside = (columns >= places[:, :1]) & (columns <= places[:, 1:2])  # [B, T]
    embedding = lm.model.get_input_embeddings()
    spread = noise * embedding.weight.float().std()
    generator = torch.Generator().manual_seed(seed)
    corrupted, restored = torch.zeros(()), torch.zeros(len(layers), len(PLACES))
    for _ in range(samples):
        shake = torch.randn(*batch.input_ids.shape, lm.anatomy.hidden_size, generator=generator).to(lm.device)
        with add_to_output(embedding, spread * shake * inside.unsqueeze(-1)):
            corrupted += _answer(lm, batch).mean().cpu() / samples
            for layer, path in enumerate(lm.anatomy.layers):
                for place in range(len(PLACES)):
                    with _restored(lm, path, states[str(layer)], places[:, place]):
                        restored[layer, place] += _answer(lm, batch).mean().cpu() / samples
    return Trace(float(clean.mean()), float(corrupted), restored)


def _answer(lm: LanguageModel, batch: Batch) -> Tensor:
    """p(first target token) [B]."""
    logits = lm.target_logits(batch)[:, 0].float()  # [B, V]
    return torch.softmax(logits, -1).gather(-1, batch.targets[:, :1]).squeeze(-1)


def _restored(lm: LanguageModel, path: str, clean: Tensor, columns: Tensor) -> ExitStack:
    rows = torch.arange(len(columns), device=columns.device)

    def put_back(_: Any, __: Any, output: Any) -> Any:
        state = first(output).clone()
        state[rows, columns] = clean[rows, columns]
        return with_first(output, state)

    stack = ExitStack()
    stack.callback(submodule(lm.model, path).register_forward_hook(put_back).remove)
    return stack
