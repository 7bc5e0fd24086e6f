"""Find the value: what an MLP must write at the subject's last token for the model to give the new answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.resume import from_layer, states_at
from errata.objectives.base import Objective
from errata.objectives.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.lm.tokens import Batch, Encoded


@dataclass(frozen=True, slots=True)
class Values:
    """What was found for F facts.

    delta [F, d]: to be added to the down-projection's output at the subject's last token; v* = base + delta.
    base [F, d]: that output before, in the first context. keys [F, d_in]: its input, mean over the contexts.
    probability [F]: p(target), the product over its tokens, first context, with delta in place.
    """

    delta: Tensor
    base: Tensor
    keys: Tensor
    probability: Tensor


@contextmanager
def at_subject(lm: LanguageModel, layer: int, batch: Batch, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `change(output at the subject's last token [B, d])` is added there to the MLP output of `layer`."""
    rows, shape = torch.arange(len(batch), device=lm.device), batch.input_ids.shape

    def delta(output: Tensor) -> Tensor:
        full = output.reshape(*shape, -1)
        place = torch.zeros_like(full)
        return place.index_put((rows, batch.subject_last), change(full[rows, batch.subject_last])).reshape(output.shape)

    with add_to_output(submodule(lm.model, lm.anatomy.mlp_down[layer]), delta):
        yield


def target_probability(logits: Tensor, batch: Batch) -> Tensor:
    """p(target) [B], the product over its tokens; logits [B, Tm, V]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = torch.log_softmax(wide, -1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)  # [B, Tm]
    return (picked * batch.mask).sum(-1).exp()


def find_values(
    lm: LanguageModel,
    layer: int,
    facts: Sequence[Sequence[Encoded]],
    *,
    steps: int = 25,
    lr: float = 0.5,
    decay: float = 1e-3,
    clamp: float = 4.0,
    stop: float = 5e-2,
    objective: Objective | None = None,
) -> Values:
    """Optimise δ for F independent facts at once (ROME, eq. 4; MEMIT, eq. 16), by Adam, with the weights as they are.

    facts: for each fact its contexts: the prompt with its target and subject position, in C wordings or with C prefixes (one C for all).
    lr: Adam's step, in units of the output's own entries. decay: weight of (‖δ‖/‖base‖)². clamp: ‖δ‖ ≤ clamp · ‖base‖ after each step.
    stop: a fact whose objective falls below it is finished and keeps its δ.
    Only the layers from `layer` on run, from cached states.
    Raises ValueError if the facts differ in their number of contexts or a prompt has no subject.
    """
    objective = objective or CrossEntropy()
    number, contexts = len(facts), len(facts[0])
    if any(len(fact) != contexts for fact in facts) or any(e.subject_last is None for fact in facts for e in fact):
        raise ValueError("every fact needs the same number of contexts, each with the subject's position")
    batch = lm.batch([encoded for fact in facts for encoded in fact])  # row f·C + c
    rows = torch.arange(len(batch), device=lm.device)
    states = states_at(lm, batch, layer)
    path = lm.anatomy.mlp_down[layer]
    with (
        torch.no_grad(),
        from_layer(lm, layer, states),
        capture(lm.model, {"k": path}, inputs=True) as ins,
        capture(lm.model, {"v": path}) as outs,
    ):
        lm.target_logits(batch)
    keys = ins["k"][rows, batch.subject_last].view(number, contexts, -1).mean(1)  # [F, d_in]
    base = outs["v"][rows, batch.subject_last].view(number, contexts, -1)[:, 0]  # [F, d]
    size = base.norm(dim=-1, keepdim=True)

    delta = torch.zeros_like(base, requires_grad=True)  # [F, d]
    adam = torch.optim.Adam([delta], lr=lr)
    finished = torch.zeros(number, dtype=torch.bool, device=base.device)

    def logits() -> Tensor:
        with from_layer(lm, layer, states), at_subject(lm, layer, batch, lambda _: delta.repeat_interleave(contexts, 0)):
            return lm.target_logits(batch)

    for _ in range(steps):
        value = objective.evaluate(logits(), batch.targets, batch.mask)
        loss = value.loss.view(number, contexts).mean(1)  # [F]
        finished |= (loss.detach() < stop) | value.finished.view(number, contexts).all(1)
        if bool(finished.all()):
            break
        total = (loss + decay * (delta / size).square().sum(-1))[~finished].sum()
        (delta.grad,) = torch.autograd.grad(total, delta)
        before = delta.detach().clone()
        adam.step()
        with torch.no_grad():
            delta.mul_((clamp * size / delta.norm(dim=-1, keepdim=True)).clamp(max=1.0))
            delta.copy_(torch.where(finished.unsqueeze(-1), before, delta))
    with torch.no_grad():
        probability = target_probability(logits(), batch).view(number, contexts)[:, 0]
    return Values(delta.detach(), base, keys, probability)
