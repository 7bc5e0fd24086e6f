"""LocFT-BF: plain fine-tuning of one MLP down-projection, breadth-first over a whole set of facts, with an end token on every target."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errata.edits.delta import DenseDelta, master_dtype
from errata.edits.edit import Edit
from errata.facts import Fact
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.lm.resume import from_layer, resumable, states_at
from errata.lm.tokens import Encoded, encode
from errata.methods.base import Method, Session, check_length, check_range, refuse_broken

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class LocFT(Method):
    """Adam on one MLP down-projection, epoch by epoch over all facts in shuffled mini-batches (Yang et al. 2025, arXiv 2509.22072).

    The usual pipeline trains each fact until it is learned before it looks at the next, which then undoes it; here all facts of an edit
    are learned together. So it is an editor for sets: `session.edit(facts)`, in a sequence `--batch N`. With one fact an edit it is FT-M
    with an end token.

    layer: whose down-projection is trained; None: the family's, else two thirds up.
    epochs, batch_size, lr: at most so many passes over the facts, so many facts a step of Adam, no weight decay.
    stop: a mini-batch whose loss is below, or in which the objective says that no token is active, makes no step; an epoch without any
        step ends the edit.
    end: each target is followed by what ends a text: the tokenizer's end token, a line break for one that has none. Without it the
        model is never told to stop behind the answer.
    replay: in a sequence, the facts of the session's earlier edits join the epochs. Costs grow with the square of their number, and no
        other editor is given them; so it is off, and an edit sees its own facts alone.
    """

    name: ClassVar[str] = "locft"
    for_sets: ClassVar[bool] = True
    paper: ClassVar[str] = "LocFT-BF: arXiv 2509.22072"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"lr": 5e-4, "epochs": 25, "batch_size": 100},
        "llama-3-8b": {"layer": 22},
        "llama-3.1-8b": {"layer": 22},
        "qwen2.5-7b": {"layer": 6},
        # Tuned on the dev cases with cross-entropy, one fact and a hundred at a time.
        "atlas": {"layer": 5, "lr": 2e-2, "epochs": 25, "batch_size": 10},
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.01, "n_sigma": 0.5, "lam": 0.1, "reduction": "mean"},  # FT-M's
    }

    layer: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    stop: float = 1e-2
    end: bool = True
    replay: bool = False

    def __post_init__(self) -> None:
        check_range(self.name, "epochs", self.epochs, 1)
        check_range(self.name, "batch_size", self.batch_size, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        check_range(self.name, "stop", self.stop, 0)

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        layers = len(lm.anatomy.layers)
        chosen = self.for_model(lm)
        chosen = replace(chosen, layer=2 * layers // 3 if chosen.layer is None else chosen.layer)
        if not 0 <= chosen.layer < layers:  # type: ignore[operator]  # filled in above
            raise ModelError(f"{lm.name} has layers 0 to {layers - 1}, not {chosen.layer}; choose one of these for {self.name}")
        resumable(lm, chosen.layer)  # type: ignore[arg-type]
        refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[chosen.layer]}.weight"])  # type: ignore[index]
        return _BreadthFirst(lm, chosen, objective, seed)


class _BreadthFirst(Session):
    method: LocFT

    def __init__(self, lm: LanguageModel, method: LocFT, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        self.earlier: list[Fact] = []  # for `replay`

    def encode(self, fact: Fact) -> Encoded:
        """Prompt, target and, with `end`, what ends the text, as part of the target. Raises FactError as `Session.encode` does."""
        encoded = super().encode(fact)
        if not self.method.end:
            return encoded
        stop = self.lm.tokenizer.eos_token_id
        ended = (
            encode(self.lm.tokenizer, fact.text, f"{fact.target}\n")  # the break may be part of the last token: ".\n"
            if stop is None
            else replace(encoded, ids=(*encoded.ids, stop))
        )
        check_length(self.lm, fact, [ended])
        return ended

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        lm, ft = self.lm, self.method
        assert ft.layer is not None and ft.epochs is not None and ft.lr is not None and ft.batch_size is not None  # for_model's
        asked = {fact.text for fact in facts}
        earlier = [fact for fact in self.earlier if fact.text not in asked]  # what is said anew is not learned again as it was
        texts = [self.encode(fact) for fact in [*facts, *earlier]]
        states = list(_states(lm, texts, ft.layer, ft.batch_size))
        path = lm.anatomy.mlp_down[ft.layer]
        module = submodule(lm.model, path)
        weight: Tensor = module.weight  # type: ignore[assignment]
        change = torch.zeros(
            lm.anatomy.hidden_size, lm.anatomy.key_size, dtype=master_dtype(weight), device=weight.device, requires_grad=True
        )
        adam = torch.optim.Adam([change], lr=ft.lr)
        drawn = torch.Generator().manual_seed(self.seed + self.count)
        losses: list[float] = []
        steps = 0
        for epoch in range(ft.epochs + 1):  # the last one only looks at what the others came to
            total, before = 0.0, steps
            for rows in torch.randperm(len(texts), generator=drawn).split(ft.batch_size):
                chosen = rows.tolist()
                loss, learned = self._loss([texts[i] for i in chosen], [states[i] for i in chosen], path, change)
                total += len(chosen) * loss.item()
                if epoch < ft.epochs and not learned:
                    (change.grad,) = torch.autograd.grad(loss, change)
                    adam.step()
                    steps += 1
            losses.append(total / len(texts))
            refuse_broken(lm, losses)
            if steps == before:
                break
        stored = change.detach().T.contiguous() if is_conv1d(module) else change.detach()
        diagnostics = {"epochs": len(losses) - 1, "steps": steps, "losses": losses, "seconds": time.perf_counter() - clock}
        return Edit(lm, [DenseDelta(path, stored)], facts, ft.to_dict(), self.record(), diagnostics)

    def remember(self, edit: Edit) -> None:
        """See `Session.remember`."""
        super().remember(edit)
        if self.method.replay:
            said = {fact.text for fact in edit.facts}
            self.earlier = [*(fact for fact in self.earlier if fact.text not in said), *edit.facts]

    def _loss(self, texts: Sequence[Encoded], states: Sequence[Tensor], path: str, change: Tensor) -> tuple[Tensor, bool]:
        """The mean loss of a mini-batch with `change` in the weight, and whether it is learned."""
        lm, layer = self.lm, self.method.layer
        assert layer is not None
        batch = lm.batch(texts)
        with from_layer(lm, layer, pad_sequence(list(states), batch_first=True)), capture(lm.model, {"k": path}, inputs=True) as seen:
            reference = None
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = lm.target_logits(batch)
            with add_to_output(submodule(lm.model, path), lambda _: seen["k"].to(change.dtype) @ change.T):
                value = self.objective.evaluate(lm.target_logits(batch), batch.targets, batch.mask, reference)
        loss = value.loss.mean()
        return loss, loss.item() < self.method.stop or bool(value.finished.all())

    def state_dict(self) -> dict[str, Any]:
        """The facts that are replayed too."""
        return super().state_dict() | {"earlier": [fact.to_dict() for fact in self.earlier]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        self.earlier = [Fact.from_dict(fact) for fact in state["earlier"]]


def _states(lm: LanguageModel, texts: Sequence[Encoded], layer: int, batch_size: int) -> Iterator[Tensor]:
    """What enters `layer` [T, d] for each text, without padding: only that layer's down-projection changes, so once is enough."""
    for start in range(0, len(texts), batch_size):
        batch = lm.batch(texts[start : start + batch_size])
        for row, length in zip(states_at(lm, batch, layer), batch.attention_mask.sum(1).tolist(), strict=True):
            yield row[:length].clone()
