"""Find the value: what must stand at the subject's last token for the model to give the new answer (ROME eq. 4, MEMIT eq. 16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.capture import add_to_output, submodule
from errata.lm.suffix import Suffix
from errata.objectives.base import Objective

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.lm.tokens import Batch, Encoded
    from errata.methods.locate.contexts import Request

Projector = Callable[[Tensor, Tensor], Tensor]
GROUP = 64
"""At most so many facts run together; beyond it nothing is gained, and logits [facts · contexts · Tm, V] grow."""


@dataclass(frozen=True, slots=True)
class Search:
    """How δ is looked for: Adam on δ [d], at most `steps` updates at rate `lr`, minimising

        objective (mean over contexts) + kl · KL(now ‖ before) of the token after "{subject} is a" + decay · ‖δ‖ / ‖v₀‖²

    with ‖δ‖ ≤ clamp · ‖v₀‖ after each step. A fact is finished, and keeps its δ, when that sum falls below `stop`, when every token of
    its target is clipped by the objective, or (where `enough` is set) when p(target) in the bare prompt is above `enough`.
    """

    steps: int
    lr: float
    decay: float
    clamp: float
    kl: float = 0.0
    stop: float = 5e-2
    enough: float | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """What was found for F facts.

    delta [F, d]: to be added at the subject's last token. probability [F]: p(target) with it, the product over its tokens, bare prompt.
    steps [F]: updates that each took. traces [F, S + 1]: what was minimised, before each update and after the last; that of a finished
        fact stays as it was.
    """

    delta: Tensor
    probability: Tensor
    steps: Tensor
    traces: Tensor

    @property
    def losses(self) -> list[float]:
        """What was minimised, mean over the facts, until the last of them was finished."""
        losses: list[float] = self.traces[:, : int(self.steps.max()) + 1].mean(0).tolist()
        return losses

    def of(self, facts: slice) -> Values:
        """Those of some of the facts."""
        return Values(self.delta[facts], self.probability[facts], self.steps[facts], self.traces[facts])


@contextmanager
def at_subject(lm: LanguageModel, layer: int, batch: Batch, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `change(output at the subject's last token [B, d])` is added there to the MLP output of `layer`."""
    with _added_at(lm, layer, batch.input_ids.shape[1], batch.subject_last, change):
        yield


def target_probability(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """p(target) [B], the product over its tokens; logits [B, Tm, V], targets and mask [B, Tm]."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    picked = torch.log_softmax(wide, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [B, Tm]
    return picked.masked_fill(~mask, 0).sum(-1).exp()


def find_values(
    lm: LanguageModel,
    layer: int,
    requests: Sequence[Request],
    base: Tensor,
    search: Search,
    objective: Objective,
    project: Projector | None = None,
) -> Values:
    """Optimise δ for F independent facts, with the weights as they are.

    layer: δ is added to its output, through the output of its MLP (which is the same unless a norm comes between).
    base [F, d], float32 or wider: v₀, what stands there now; it sets the scale of `clamp` and `decay`. δ has its type.
    project: (rows [A, d], facts [A]) -> [A, d], applied to δ of these facts after each update, before the clamp (DeltaEdit eq. 21).

    Only what δ can change runs: the layers above (from `layer` itself on in post-norm models), the tokens from the subject's last one
    on, the head where it predicts a target; facts of like length run together, and a finished one leaves. Facts do not touch one
    another: each gets the δ that it would get alone.

    Raises ValueError if the facts differ in their number of contexts.
    """
    contexts = len(requests[0].contexts)
    if any(len(request.contexts) != contexts for request in requests):
        raise ValueError("every fact needs the same number of contexts")
    delta, probability = torch.zeros_like(base), torch.zeros(len(base), device=base.device)
    steps, traces = torch.zeros(len(base), dtype=torch.long, device=base.device), torch.zeros(len(base), search.steps + 1)
    for alike in _groups(requests):
        facts = torch.tensor(alike, device=base.device)
        found = _search(lm, layer, [requests[i] for i in alike], base[facts], facts, search, objective, project)
        delta[facts], probability[facts], steps[facts] = found.delta, found.probability, found.steps
        traces[alike] = found.traces[:, -1:]  # a group that is done earlier stays where it is
        traces[alike, : found.traces.shape[1]] = found.traces
    return Values(delta, probability, steps, traces)


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of facts that run together without padding to speak of: targets of one length, suffixes of about one length."""

    def shape(i: int) -> tuple[int, int]:
        bare = requests[i].contexts[0]
        return len(bare.target_ids), max(len(text.ids) - int(text.subject_last or 0) for text in requests[i].contexts)

    groups: list[list[int]] = []
    for i in sorted(range(len(requests)), key=shape):
        if groups and shape(groups[-1][0])[0] == shape(i)[0] and shape(i)[1] <= 1.5 * shape(groups[-1][0])[1] and len(groups[-1]) < GROUP:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _search(
    lm: LanguageModel,
    layer: int,
    requests: Sequence[Request],
    base: Tensor,
    facts: Tensor,
    search: Search,
    objective: Objective,
    project: Projector | None,
) -> Values:
    """`find_values` for facts whose targets have one length Tm. facts [F]: what `project` knows them by."""
    count, contexts, length = len(requests), len(requests[0].contexts), len(requests[0].contexts[0].target_ids)
    width = contexts + (search.kl > 0)  # texts of a fact: its contexts, then the essence
    run = _Runner(lm, layer, [text for request in requests for text in (*request.contexts, request.essence)[:width]])
    size = torch.linalg.vector_norm(base, dim=-1, keepdim=True)  # [F, 1]
    delta = torch.zeros_like(base, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.lr)
    active = torch.arange(count, device=base.device)
    probability, last = torch.zeros(count, device=base.device), torch.zeros(count, device=base.device)
    steps, traces = torch.zeros(count, dtype=torch.long, device=base.device), []
    reference = before = None
    targets = torch.tensor([text.target_ids for request in requests for text in request.contexts], device=base.device)
    targets = targets.view(count, contexts, length)
    mask = torch.ones(count * contexts, length, dtype=torch.bool, device=base.device)
    for step in range(search.steps + 1):
        rows = run(delta[active].repeat_interleave(width, 0)).unflatten(0, (len(active), -1))  # [A, C·Tm (+ 1), V]
        asked = rows[:, : contexts * length].reshape(len(active) * contexts, length, -1)  # [A·C, Tm, V]
        if step == 0 and objective.needs_reference:
            reference = asked.detach().unflatten(0, (count, contexts))
        wanted, there = targets[active].flatten(0, 1), mask[: len(asked)]
        value = objective.evaluate(asked, wanted, there, None if reference is None else reference[active].flatten(0, 1))
        loss = value.loss.unflatten(0, (-1, contexts)).mean(1)  # [A]
        if search.kl > 0:
            now = torch.log_softmax(rows[:, -1].to(loss.dtype), -1)  # [A, V]
            before = now.detach() if before is None else before
            loss = loss + search.kl * (now.exp() * (now - before[active])).sum(-1)
        loss = loss + search.decay * torch.linalg.vector_norm(delta[active], dim=-1) / size[active, 0].square()
        last[active] = loss.detach().float()
        traces.append(last.to("cpu", copy=True))
        first = slice(None, None, contexts)
        probability[active] = target_probability(asked[first], wanted[first], there[first]).float()
        finished = (loss.detach() < search.stop) | value.finished.unflatten(0, (-1, contexts)).all(1)
        if search.enough is not None:
            finished |= probability[active] > search.enough
        if step == search.steps or bool(finished.all()):
            break
        (delta.grad,) = torch.autograd.grad(loss[~finished].sum(), delta)
        kept = delta.detach().clone()
        adam.step()
        if bool(finished.any()):
            going = (~finished).nonzero().squeeze(-1)
            run.keep((going[:, None] * width + torch.arange(width, device=going.device)).flatten())
            active = active[going]
        with torch.no_grad():
            moved = delta[active] if project is None else project(delta[active], facts[active])
            moved = moved * (search.clamp * size[active] / torch.linalg.vector_norm(moved, dim=-1, keepdim=True)).clamp(max=1.0)
            delta.copy_(kept).index_copy_(0, active, moved)  # Adam's momentum goes on moving the finished ones: put them back
        steps[active] += 1
    return Values(delta.detach(), probability, steps, torch.stack(traces, 1))


class _Runner:
    """Logits at the N targets of B texts, as a function of what is added at their subjects' last tokens.

    Where the MLP writes straight into the residual stream, what is added to its output arrives at the layer above as it is, so `layer`
    itself need not run.
    """

    def __init__(self, lm: LanguageModel, layer: int, texts: Sequence[Encoded]) -> None:
        self.lm, self.layer = lm, layer
        self.straight = lm.anatomy.writes_straight and layer + 1 < len(lm.anatomy.layers)
        self.suffix = Suffix(lm, texts, layer + 1 if self.straight else layer)

    def keep(self, rows: Tensor) -> None:
        self.suffix = self.suffix.keep(rows)

    def __call__(self, delta: Tensor) -> Tensor:
        """delta [B, d] -> logits [N, V], text by text."""
        states, columns = self.suffix.states, self.suffix.columns
        if self.straight:
            rows = torch.arange(len(states), device=states.device)
            return self.suffix.rows(states.index_put((rows, columns), delta.to(states), accumulate=True))
        with _added_at(self.lm, self.layer, states.shape[1], columns, lambda _: delta):
            return self.suffix.rows(states)


@contextmanager
def _added_at(lm: LanguageModel, layer: int, width: int, columns: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change(output there [B, d])` is added to the MLP output of `layer` in one column of each of B texts of `width` tokens."""
    rows = torch.arange(len(columns), device=columns.device)

    def delta(output: Tensor) -> Tensor:
        full = output.reshape(len(columns), width, -1)
        place = torch.zeros_like(full)
        return place.index_put((rows, columns), change(full[rows, columns]).to(full)).reshape(output.shape)

    with add_to_output(submodule(lm.model, lm.anatomy.mlp_down[layer]), delta):
        yield
