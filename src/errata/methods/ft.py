"""Fine-tuning of one MLP down-projection: FT-M on the target's tokens, FT-L on the last prompt position."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from errata.edits.delta import DenseDelta, master_dtype
from errata.edits.edit import Edit
from errata.facts import Fact
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.lm.resume import from_layer, states_at
from errata.methods.base import Method, Session, check_range, refuse_broken

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class FT(Method):
    """Adam on one MLP down-projection (FT-L: Zhu et al. 2020, Meng et al. 2022; FT-M: Zhang et al. 2024, as in OVERTONE §4.1).

    variant: "m": each target token is predicted behind the ones before it. "l": all target tokens are asked of the last prompt position.
    layer: whose down-projection is trained; None: the family's, else two thirds up.
    steps, lr: at most so many steps of Adam, no weight decay.
    stop: an edit whose loss falls below is finished (an objective that clips finishes by itself, METHODS "Token-level stop").
    clamp: L∞ limit of the change of every weight, None for no limit; FT-L's is 5e-4 where it is used.
    """

    paper: ClassVar[str] = "OVERTONE §4.1 (FT-M: arXiv 2401.01286); FT-L: arXiv 2012.00363"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"lr": 5e-4, "steps": 25},
        "llama-2-7b": {"layer": 21},
        "llama-3-8b": {"layer": 21},
        "llama-3.1-8b": {"layer": 21},
        "gpt-j-6b": {"layer": 21},
        "qwen2.5-7b": {"layer": 27},
        "atlas": {"layer": 4, "lr": 4e-2, "steps": 25},  # tuned on the dev cases with cross-entropy
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.01, "n_sigma": 0.5, "lam": 0.1, "reduction": "mean"},
    }

    variant: Literal["m", "l"] = "m"
    layer: int | None = None
    steps: int | None = None
    lr: float | None = None
    stop: float = 1e-2
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in ("m", "l"):
            raise ValueError(f"ft: variant must be 'm' (the target's tokens) or 'l' (the last prompt position), got {self.variant!r}")
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        check_range(self.name, "stop", self.stop, 0)
        check_range(self.name, "clamp", self.clamp, 0, above=True)

    @property
    def name(self) -> str:  # type: ignore[override]  # the variant is part of the name
        """ft-m or ft-l."""
        return f"ft-{self.variant}"

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        layers = len(lm.anatomy.layers)
        chosen = self.for_model(lm)
        chosen = replace(chosen, layer=2 * layers // 3 if chosen.layer is None else chosen.layer)
        if not 0 <= chosen.layer < layers:  # type: ignore[operator]  # filled in above
            raise ModelError(f"{lm.name} has layers 0 to {layers - 1}, not {chosen.layer}; choose one of these for {self.name}")
        refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[chosen.layer]}.weight"])  # type: ignore[index]
        return _Tuning(lm, chosen, objective, seed)


class _Tuning(Session):
    method: FT

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        lm, ft = self.lm, self.method
        assert ft.layer is not None and ft.steps is not None and ft.lr is not None  # for_model filled them in
        encoded = [self.encode(fact) for fact in facts]
        batch = lm.batch(encoded)
        if ft.variant == "l":  # every target token is asked of the position before the first one
            batch = replace(batch, positions=torch.where(batch.mask, batch.positions[:, :1], batch.positions))
        path = lm.anatomy.mlp_down[ft.layer]
        module = submodule(lm.model, path)
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        # Only this projection changes: its input, and everything below its layer, is the same at every step.
        states = states_at(lm, batch, ft.layer)
        change = torch.zeros(
            lm.anatomy.hidden_size, lm.anatomy.key_size, dtype=master_dtype(weight), device=weight.device, requires_grad=True
        )
        adam = torch.optim.Adam([change], lr=ft.lr)
        losses: list[float] = []
        reference = None
        with from_layer(lm, ft.layer, states) as whole, capture(lm.model, {"k": path}, inputs=True) as seen:
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = lm.target_logits(batch)
            with add_to_output(module, lambda _: seen["k"].to(change.dtype) @ change.T):
                for step in range(ft.steps + 1):
                    if self.watch:
                        self.watch(step, whole())
                    value = self.objective.evaluate(lm.target_logits(batch), batch.targets, batch.mask, reference)
                    losses.append(value.loss.mean().item())
                    refuse_broken(lm, losses)
                    if step == ft.steps or losses[-1] < ft.stop or bool(value.finished.all()):
                        break
                    (change.grad,) = torch.autograd.grad(value.loss.mean(), change)
                    adam.step()
                    if ft.clamp is not None:
                        change.data.clamp_(-ft.clamp, ft.clamp)
        stored = change.detach().T.contiguous() if is_conv1d(module) else change.detach()
        diagnostics = {"steps": len(losses) - 1, "losses": losses, "seconds": time.perf_counter() - clock}
        return Edit(lm, [DenseDelta(path, stored)], facts, ft.to_dict(), self.record(), diagnostics)
