"""LoRA: low-rank adapters on the attention's query and value projections, trained on the edit; the adapters are PEFT's."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from errata.edits.delta import LowRankDelta
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.facts import Fact, FactError
from errata.lm.capture import add_from_input, submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.lm.resume import can_resume
from errata.lm.tokens import Encoded
from errata.methods.base import Method, Session, check_range, encode_each, refuse_broken
from errata.methods.together import Stacked, alike, train

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

#: Names of what computes queries and values: apart, or fused with the keys.
_APART, _FUSED = ({"q_proj", "v_proj"}, {"c_attn", "qkv_proj", "query_key_value"})


@dataclass(frozen=True)
class LoRA(Method):
    """Adam on low-rank adapters W + (alpha/rank) B A (Hu et al. 2021, arXiv 2106.09685), as OVERTONE §4.1 edits with it.

    rank, alpha, dropout: PEFT's; dropout is on while training and nowhere else.
    steps, lr: at most so many steps of Adam, no weight decay. The optimisation also ends when the objective says that no token is active.
    targets: names of the adapted modules; None: query and value of every layer, or the fused projection that holds them.
    A session goes on training its adapter from edit to edit; each edit holds what was added since the one before it.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv 2106.09685, as in OVERTONE §4.1"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"lr": 5e-3, "steps": 70},
        "qwen2.5-7b": {"steps": 60},
        "llama-3.1-8b": {"steps": 50},
        "atlas": {"lr": 5e-4, "steps": 50},  # tuned on the dev cases with cross-entropy; the default 5e-3 over-fits there
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.05, "n_sigma": 0.5, "lam": 0.1, "reduction": "mean"},
    }

    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    steps: int | None = None
    lr: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_range(self.name, "rank", self.rank, 1)
        check_range(self.name, "alpha", self.alpha, 1)
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        check_range(self.name, "dropout", self.dropout, 0, 0.99)

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        chosen = self.for_model(lm)
        names = {name.rpartition(".")[2] for name, module in lm.model.named_modules() if hasattr(module, "weight")}
        found = chosen.targets or tuple(sorted(names & _APART if names >= _APART else names & _FUSED))
        if not found or (missing := set(found) - names):
            unknown = f"no module named {', '.join(sorted(missing))}" if found else "no query and value projections that LoRA knows"
            raise ModelError(f"{lm.name} has {unknown}; name the modules to adapt with targets")
        paths = [name for name, _ in lm.model.named_modules() if name.rpartition(".")[2] in found]
        refuse_uneditable(lm, [f"{path}.weight" for path in paths])
        _ = lm.anatomy  # found now, not while adapters are in the model and their dropout is on
        return _Adapting(lm, replace(chosen, targets=found), objective, seed)

    def many(
        self, lm: LanguageModel, requests: Sequence[Sequence[Fact]], seeds: Sequence[int], objective: Objective | None = None
    ) -> list[Edit | FactError]:
        """See `Method.many`. Each edit begins with the adapter, and draws the dropout masks, that its seed gives it alone."""
        if len(requests) < 2 or not can_resume(lm):
            return super().many(lm, requests, seeds, objective)
        session = self.start(lm, objective)
        assert isinstance(session, _Adapting)
        return session.many(requests, seeds)


class _Adapting(Session):
    method: LoRA

    def __init__(self, lm: LanguageModel, method: LoRA, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        self.adapter: dict[str, tuple[Tensor, Tensor]] = {}  # path -> A [r, in], B [out, r]; empty before the first edit
        # A long sequence folds its edits, and all but the last need not live on here.
        self.edits: list[weakref.ref[Edit]] = []
        self.last: Edit | None = None

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        lora = self.method
        assert lora.steps is not None and lora.lr is not None  # for_model filled them in
        batch = self.lm.batch([self.encode(fact) for fact in facts])
        losses: list[float] = []
        scale = lora.alpha / lora.rank
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with self._without_adapter(), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed + self.count)
            reference = None
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = self.lm.target_logits(batch)
            with _adapted(self.lm, lora, self.adapter) as adapters:
                parameters = [p for pair in adapters.values() for p in pair]
                adam = torch.optim.Adam(parameters, lr=lora.lr)
                for step in range(lora.steps + 1):
                    if self.watch:
                        self.watch(step, _at_rest(self.lm))
                    value = self.objective.evaluate(self.lm.target_logits(batch), batch.targets, batch.mask, reference)
                    losses.append(value.loss.mean().item())
                    refuse_broken(self.lm, losses)
                    if step == lora.steps or bool(value.finished.all()):
                        break
                    for parameter, gradient in zip(parameters, torch.autograd.grad(value.loss.mean(), parameters), strict=True):
                        parameter.grad = gradient
                    adam.step()
                trained = {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in adapters.items()}
        deltas = []
        for path, (a, b) in trained.items():
            left, right = scale * b, a
            if path in self.adapter:  # the change since the last edit: B A - B' A'
                old_a, old_b = self.adapter[path]
                left, right = torch.cat([left, -scale * old_b], 1), torch.cat([right, old_a])
            deltas.append(LowRankDelta(path, left, right))
        diagnostics = {"steps": len(losses) - 1, "losses": losses, "seconds": time.perf_counter() - clock}
        return Edit(self.lm, deltas, facts, lora.to_dict(), self.record(), diagnostics)

    def remember(self, edit: Edit) -> None:
        """See `Session.remember`. The adapter is what an edit writes first; behind it stands what it takes away of the one before."""
        super().remember(edit)
        rank, scale = self.method.rank, self.method.alpha / self.method.rank
        for delta in edit.deltas:
            assert isinstance(delta, LowRankDelta)
            self.adapter[delta.path] = (delta.right[:rank].to(self.lm.device), (delta.left[:, :rank] / scale).to(self.lm.device))
        self.last = edit
        self.edits.append(weakref.ref(edit))

    def many(self, requests: Sequence[Sequence[Fact]], seeds: Sequence[int]) -> list[Edit | FactError]:
        """Independent edits, side by side, each from an adapter of its own; see `Method.many`."""
        lora = self.method
        assert lora.steps is not None and lora.lr is not None  # for_model filled them in
        texts, there, made = encode_each(self, requests)
        for group in alike(texts):
            clock = time.perf_counter()
            edits = _Adapters(self.lm, lora, [texts[i] for i in group], [seeds[there[i]] for i in group])
            trained = train(edits, self.objective, lora.lr, lora.steps)
            seconds = (time.perf_counter() - clock) / len(group)
            for i, one in zip(group, trained, strict=True):
                pairs = zip(one.parameters[::2], one.parameters[1::2], strict=True)
                deltas = [LowRankDelta(path, edits.scale * b, a) for path, (a, b) in zip(edits.paths, pairs, strict=True)]
                diagnostics = {"steps": len(one.losses) - 1, "losses": one.losses, "seconds": seconds}
                made[there[i]] = Edit(self.lm, deltas, list(requests[there[i]]), lora.to_dict(), self.record(), diagnostics)
        return [made[number] for number in range(len(requests))]

    def _without_adapter(self) -> AbstractContextManager[object]:
        """The adapter that goes on being trained is in the weights already, through the earlier edits: take it out while training."""
        known = [edit for made in self.edits if (edit := made()) is not None]
        if missing := [edit for edit in known if not edit.applied]:
            raise EditError(
                f"LoRA goes on training one adapter, but {missing[0]} of this session is not applied; apply() it, or start anew"
            )
        if not self.adapter:
            return nullcontext()
        scale = self.method.alpha / self.method.rank
        return Edit(self.lm, [LowRankDelta(path, -scale * b, a) for path, (a, b) in self.adapter.items()], [], {"name": "less"}).applied_()

    def state_dict(self) -> dict[str, Any]:
        """The adapter too."""
        return super().state_dict() | {"adapter": dict(self.adapter)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        self.adapter = dict(state["adapter"])


class _Adapters(Stacked):
    """E adapters of every adapted module: A [E, r, in] and B [E, out, r] in turn. paths: those modules, in order."""

    def __init__(self, lm: LanguageModel, lora: LoRA, texts: Sequence[Sequence[Encoded]], seeds: Sequence[int]) -> None:
        super().__init__(lm, texts, 0)
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        first = _fresh(lm, lora, seeds)
        self.paths = list(first[0][0])
        self.leaves = [
            torch.stack([adapters[path][part] for adapters, _ in first]).requires_grad_() for path in self.paths for part in (0, 1)
        ]
        #: What each edit's masks are drawn from, for the shape [facts, tokens] that it has alone.
        self.draws = [(draw, len(own), max(len(text.ids) for text in own)) for own, (_, draw) in zip(texts, first, strict=True)]

    def logits(self) -> Tensor:
        with ExitStack() as stack:
            for place, path in enumerate(self.paths):
                stack.enter_context(add_from_input(submodule(self.lm.model, path), partial(self._change, 2 * place)))
            return self.suffix.logits(self.suffix.states)

    def _change(self, place: int, x: Tensor) -> Tensor:
        a, b = self.leaves[place : place + 2]
        x = x.reshape(len(self.suffix), -1, x.shape[-1]).to(a.dtype)
        if self.dropout > 0:
            x = x * self._mask(x)
        return self.owners.low_rank(x, b * (self.scale / (1 - self.dropout)), a)

    def _mask(self, x: Tensor) -> Tensor:
        """What dropout lets through of x [B, T, in], where T may be less than an edit's own width, or more: 1 or 0."""
        mask = x.new_zeros(x.shape)
        row = 0
        for generator, facts, tokens in self.draws:
            drawn = x.new_empty(facts, tokens, x.shape[-1]).bernoulli_(1 - self.dropout, generator=generator)
            mask[row : row + facts, :tokens] = drawn[:, : x.shape[1]]
            row += facts
        return mask

    def keep(self, edits: list[int]) -> Tensor:
        self.draws = [self.draws[edit] for edit in edits]
        return super().keep(edits)


class _Dropout(nn.Module):
    """torch's dropout on a CPU, drawn in the same way on every device: from a generator that edits side by side can each have."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(1 - self.p).div_(1 - self.p) if self.training else x


Adapters = dict[str, tuple[Tensor, Tensor]]
"""path -> A [r, in], B [out, r]"""


def _fresh(lm: LanguageModel, lora: LoRA, seeds: Sequence[int]) -> list[tuple[Adapters, torch.Generator]]:
    """PEFT's new adapters under each seed, and a generator that goes on where they stopped drawing.

    PEFT's own injection takes longer than an edit's share of a batch, so it is asked once and its draws are repeated for the other seeds;
    should they not be what it draws (another PEFT), it is asked for each.
    """
    begun, generator = _injected(lm, lora, seeds[0])
    again, other = _drawn(lm, lora, seeds[0], begun)
    same = torch.equal(generator.get_state(), other.get_state()) and all(torch.equal(begun[path][0], again[path][0]) for path in begun)
    return [(begun, generator), *((_drawn(lm, lora, seed, begun) if same else _injected(lm, lora, seed)) for seed in seeds[1:])]


def _drawn(lm: LanguageModel, lora: LoRA, seed: int, like: Adapters) -> tuple[Adapters, torch.Generator]:
    """What PEFT draws for adapters of the shapes of `like`: two linear maps as torch begins them, and A once more."""
    made: Adapters = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for path, (a, b) in like.items():
            down = nn.Linear(a.shape[1], lora.rank, bias=False)
            nn.Linear(lora.rank, b.shape[0], bias=False)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            made[path] = (down.weight.detach().to(a), torch.zeros_like(b))
        return made, _generator(lm, seed)


def _injected(lm: LanguageModel, lora: LoRA, seed: int) -> tuple[Adapters, torch.Generator]:
    """What PEFT itself begins with."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        with _adapted(lm, lora, {}) as adapters:
            made = {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in adapters.items()}
        return made, _generator(lm, seed)


def _generator(lm: LanguageModel, seed: int) -> torch.Generator:
    """What dropout draws from next: on a CPU the generator that drew the adapters, elsewhere the device's own, new."""
    generator = torch.Generator(lm.device)
    return generator.set_state(torch.get_rng_state()) if lm.device.type == "cpu" else generator.manual_seed(seed)


@contextmanager
def _at_rest(lm: LanguageModel) -> Iterator[None]:
    """The adapters without their dropout while it lasts: the half-made edit as it would be."""
    from peft.tuners.lora import LoraLayer

    training: list[Any] = [m.lora_dropout for m in lm.model.modules() if isinstance(m, LoraLayer) and m.lora_dropout.training]
    for dropout in training:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in training:
            dropout.train()


@contextmanager
def _adapted(
    lm: LanguageModel, lora: LoRA, start: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """PEFT's adapters in the model while it lasts, from `start` or new; path -> (A, B). The model comes back as it was."""
    from peft import LoraConfig, inject_adapter_in_model  # 8 s to import: only who edits with LoRA pays
    from peft.tuners.lora import LoraLayer

    trainable = {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()}
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets or ()), bias="none",
        fan_in_fan_out=lm.model.config.model_type == "gpt2",
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, lm.model)
        layers = {name: module for name, module in lm.model.named_modules() if isinstance(module, LoraLayer)}
        adapters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for path, layer in layers.items():
            pair: Any = layer  # PEFT's own types know tensors and modules only
            a, b = pair.lora_A["default"].weight, pair.lora_B["default"].weight
            if path in start:
                with torch.no_grad():
                    a.copy_(start[path][0])
                    b.copy_(start[path][1])
            if lora.dropout > 0:
                pair.lora_dropout["default"] = _Dropout(lora.dropout)
            pair.lora_dropout.train()
            adapters[path] = (a, b)
        yield adapters
    finally:
        for name, module in list(lm.model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(lm.model.get_submodule(parent), child, module.get_base_layer())
        for name, parameter in lm.model.named_parameters():
            parameter.requires_grad_(trainable[name])
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            vars(lm.model).pop(leftover, None)
