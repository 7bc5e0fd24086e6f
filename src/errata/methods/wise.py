"""WISE: a side copy of one matrix that learns the edits, and stirs at edited questions only, so that it knows which are its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from errata.edits.delta import master_dtype
from errata.edits.edit import Edit
from errata.edits.memory import grown_id
from errata.edits.side import Side, SideMemory, distances, side, unpacked
from errata.edits.stack import Stack
from errata.edits.ties import ties
from errata.facts import Fact, FactError
from errata.lm.anatomy import matrix
from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.lm.resume import from_layer, resumable, run_to, states_at
from errata.lm.tokens import Encoded, encode
from errata.methods.base import Method, Session, check_length, check_range, half_made, refuse_broken
from errata.methods.irrelevant import irrelevant, without
from errata.methods.locate.contexts import prefixes

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

T = TypeVar("T")
_CHUNK = 32  # texts that run together where only their distances are wanted


def margin(inside: Tensor, outside: Tensor, alpha: float, beta: Tensor | float, gamma: float) -> Tensor:
    """L_act = [D_out - D_in + γ]₊ + [D_out - α]₊ + [β - D_in]₊ (WISE eq. 6), each the mean over its violations, 0 without one.

    inside [B], outside [N]: distances of edited and of irrelevant questions; the first term goes over all pairs. beta may be [B].
    """

    def violated(terms: Tensor) -> Tensor:
        over = terms[terms > 0]
        return over.mean() if len(over) else terms.sum() * 0.0

    pairs = outside[None, :] - inside[:, None] + gamma
    return violated(pairs) + violated(outside - alpha) + violated(beta - inside)


@dataclass(frozen=True)
class WISE(Method):
    """A side memory with an activation margin, sharded by random masks (arXiv 2405.14768), as OVERTONE §4.1 edits with it.

    layer: whose down-projection has the side copy; None: the family's, else five sixths up.
    steps, lr: at most so many steps of SGD.
    stop: an edit is finished when its target loss falls below, or all of its tokens are clipped, and the margin loss (in `unit`s) is
        below too. As published the two together must be, which with OVERTONE's ε they never are, and must stand still.
    decay: weight decay of W′, of the entries that the mask lets learn and no others.
    margins: (α, β, γ) of L_act, in `unit`s: irrelevant questions stay below α, edited ones come above β, and γ above the others.
    unit: 1 for absolute margins, as published. None: the mean length of the main matrix's output at the tokens of irrelevant texts; the
        rate then is relative too, so that a step moves an output by as many units whatever the scale of keys and values.
    shrink: the margins times this; None: 0.6 with OVERTONE (Appendix B), else 1.
    ratio: a side's threshold is this share of the least distance of its edited questions, never below α.
    mask: share of the entries that a shard may change, drawn anew for each.
    save_every: a shard closes once it holds so many questions. merge_every: so many in closed shards are TIES-merged.
    density: of TIES. mode: "retrieve" keeps one side for each merge, "merge" one for all; before they are merged, shards answer side by
        side in both.
    prefixes: so many texts that the model wrote are put before the prompt, besides the bare one. WISE's own is 10; OVERTONE's
        experiments, with either objective, are without.
    irrelevant: where the irrelevant prompts come from, see `irrelevant.irrelevant`; beside: so many of them for each edit.
    replay: so many of the shard's earlier questions, drawn for each edit, are trained on with the new one: their targets, and that they
        stir. 0: none; as published, what a shard is told last is what it says.

    Ours, because later edits of a shard move the distances of earlier ones: its threshold is taken anew after each edit. Questions of
    other sides are irrelevant too. A new fact is to win over what was said of it before: the β of a question that other sides answer is
    their distance and γ more.
    """

    name: ClassVar[str] = "wise"
    paper: ClassVar[str] = "arXiv 2405.14768, as in OVERTONE §4.1"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"lr": 1.0, "steps": 70, "margins": (0.25, 1.0, 0.5), "ratio": 0.88, "beside": 16, "replay": 8},
        "llama-2-7b": {"layer": 27, "margins": (5.0, 20.0, 10.0), "unit": 1.0},
        "llama-3-8b": {"layer": 29, "steps": 30, "lr": 0.9, "margins": (2.0, 20.0, 10.0), "unit": 1.0, "ratio": 0.5},
        "gpt-j-6b": {"layer": 21, "margins": (5.0, 20.0, 10.0), "unit": 1.0},
        "qwen2.5-7b": {"layer": 23, "margins": (5.0, 20.0, 10.0), "unit": 1.0},
        # Tuned on the dev cases with cross-entropy: rephrasings stir about three fifths as much as the edited question itself.
        "atlas": {"layer": 4, "lr": 2.0, "ratio": 0.3, "beside": 64, "replay": 16},
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1, "reduction": "mean"},
    }

    layer: int | None = None
    steps: int | None = None
    lr: float | None = None
    stop: float = 0.02
    decay: float = 1e-5
    margins: tuple[float, float, float] | None = None
    unit: float | None = None
    shrink: float | None = None
    ratio: float | None = None
    mask: float = 0.2
    save_every: int = 500
    merge_every: int = 1000
    density: float = 0.53
    mode: Literal["retrieve", "merge"] = "retrieve"
    prefixes: int = 0
    irrelevant: str | tuple[str, ...] | None = None
    beside: int | None = None
    replay: int | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("save_every", 1),
            ("merge_every", 1),
            ("beside", 1),
            ("prefixes", 0),
            ("replay", 0),
            ("stop", 0),
            ("decay", 0),
        ):
            check_range(self.name, name, getattr(self, name), low)
        for name in ("lr", "unit", "shrink"):
            check_range(self.name, name, getattr(self, name), 0, above=True)
        for name in ("ratio", "mask", "density"):
            check_range(self.name, name, getattr(self, name), 0, 1, above=True)
        if self.mode not in ("retrieve", "merge"):
            raise ValueError(f"{self.name}: mode must be 'retrieve' or 'merge', got {self.mode!r}")
        if self.margins is not None:
            object.__setattr__(self, "margins", tuple(self.margins))  # a plan gives a list
            if len(self.margins) != 3 or min(self.margins) <= 0:
                raise ValueError(f"{self.name}: margins must be three numbers above 0 (alpha, beta, gamma), got {self.margins!r}")
        if self.irrelevant is not None and not isinstance(self.irrelevant, str):
            object.__setattr__(self, "irrelevant", tuple(self.irrelevant))

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        chosen, count = self.for_model(lm), len(lm.anatomy.layers)
        layer = 5 * count // 6 if chosen.layer is None else chosen.layer
        if not 0 <= layer < count:
            raise ModelError(f"{lm.name} has layers 0 to {count - 1}, not {layer}; choose one of these for {self.name}")
        resumable(lm, layer)
        refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[layer]}.weight"])
        overtone = objective is not None and objective.name == "overtone"
        shrink = (0.6 if overtone else 1.0) if chosen.shrink is None else chosen.shrink
        return _Siding(lm, replace(chosen, layer=layer, shrink=shrink), objective, seed)


class _Siding(Session):
    method: WISE

    def __init__(self, lm: LanguageModel, method: WISE, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        assert method.layer is not None  # start filled it in
        self.layer = method.layer
        self.module = lm.anatomy.mlp_down[self.layer]
        self.shape = lm.anatomy.hidden_size, lm.anatomy.key_size
        self.memory: SideMemory | None = None
        self._kept: dict[Encoded, Tensor] = {}  # keys of the open shard's questions [T, in]
        self.begun = 0  # shards; each draws a mask of its own
        self.prompts = irrelevant(lm, method.irrelevant)
        self.written = prefixes(lm, method.prefixes, 10) if method.prefixes else ()
        self.unit, self.rate = self._scales()

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        sides = list(self.memory.sides) if self.memory is not None else []
        encoded = [self.encode(fact) for fact in facts]
        with Stack.of(self.lm).detached_():
            held = [one.change(self.shape) for one in sides]
            if not sides or sides[-1].merged or len(sides[-1].texts) >= self.method.save_every:
                change, allowed = torch.zeros(self.shape, dtype=self._dtype, device=self._device), self._drawn_mask()
                before: tuple[Encoded, ...] = ()
                self._kept = {}
            else:
                before, change = sides[-1].texts, held.pop().to(self._device)
                allowed = unpacked(sides.pop().mask, change.numel()).view(self.shape).to(self._device)
            change, losses = self._train(facts, encoded, change, allowed, before, sides, held)
            found = distances(*self._own((*before, *encoded)), change)
            sides.append(side(change, allowed, self._threshold(found), (*before, *encoded)))
            sides = self._merged(sides)
        method = self.method.to_dict()
        parent = None if self.memory is None else self.memory.id
        id = grown_id(parent, method, self.record(), [fact.to_dict() for fact in facts], self.seed, self.count, self.lm.fingerprint)
        memory = SideMemory(id, parent, self.module, self.shape, tuple(sides))
        diagnostics = {
            "steps": len(losses) - 1,
            "losses": losses,
            "seconds": time.perf_counter() - clock,
            "distance": float(found[-len(facts) :].min()),
            "threshold": sides[-1].threshold,
            "unit": self.unit,
            "sides": len(sides),
            "begun": self.begun,
        }
        return Edit(self.lm, [], facts, method, self.record(), diagnostics, memory=memory)

    def remember(self, edit: Edit) -> None:
        """See `Session.remember`."""
        super().remember(edit)
        assert isinstance(edit.memory, SideMemory)
        self.memory, self.begun = edit.memory, int(edit.diagnostics["begun"])

    def _train(
        self,
        facts: list[Fact],
        encoded: list[Encoded],
        change: Tensor,
        allowed: Tensor,
        before: Sequence[Encoded],
        sides: Sequence[Side],
        held: Sequence[Tensor],
    ) -> tuple[Tensor, list[float]]:
        """SGD on the entries of `change` that are `allowed`, from its present value.

        before: what the shard holds already. sides, held: the other ones, and what they change.
        Gives the change, and the loss on the targets before each step and after the last.
        """
        lm, wise = self.lm, self.method
        assert wise.steps is not None and wise.beside is not None and wise.replay is not None  # for_model filled them in
        alpha, beta, gamma = self._margins
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.count)
        asked_now = {text.prompt_ids for text in encoded}
        said = {text.prompt_ids: text for text in before if text.prompt_ids not in asked_now}  # of each question the last answer
        new = [*encoded, *self._behind_prefixes(facts)]
        again = _some(list(said.values()), wise.replay, draw)
        texts = [*new, *again]
        batch = lm.batch(texts)
        # Behind a prefix only the prompt's own tokens are to stir.
        own = [text.prompt_length for text in encoded] * (1 + wise.prefixes) + [text.prompt_length for text in again]
        lengths = torch.tensor(own, device=lm.device)
        ends = torch.tensor([text.prompt_length for text in texts], device=lm.device)
        columns = torch.arange(batch.input_ids.shape[1], device=lm.device)
        asked = (columns < ends[:, None]) & (columns >= (ends - lengths)[:, None])  # [B, T]
        others = [text for one in sides for text in one.texts if text.prompt_ids not in asked_now]
        far = self._keys([*self._encoded(_some(without(self.prompts, facts), wise.beside, draw)), *_some(others, wise.beside, draw)])
        module = submodule(lm.model, self.module)
        main = matrix(module).detach().to(change)
        change = change.clone().requires_grad_()
        losses: list[float] = []
        with from_layer(lm, self.layer, states_at(lm, batch, self.layer)) as whole:
            with torch.no_grad(), capture(lm.model, {"x": self.module}, inputs=True) as seen:
                reference = lm.target_logits(batch) if self.objective.needs_reference else None
                run_to(lm, batch, self.layer)
                x = seen["x"].reshape(len(texts), -1, self.shape[1]).to(change)  # the same at every step, as the layer's keys are
                near = x, asked.to(x.device)
                claimed = [
                    torch.where(stirred > one.threshold, stirred + gamma, 0.0)
                    for one, stirred in ((one, distances(*near, other.to(change))) for one, other in zip(sides, held, strict=True))
                ]
                betas = torch.stack([torch.full_like(x[:, 0, 0], beta), *claimed]).amax(0)  # [B]

            def stir(_: Tensor) -> Tensor:
                return x @ change.mT

            for step in range(wise.steps + 1):
                if self.watch:
                    so_far = change.detach()
                    now = side(so_far, allowed, self._threshold(distances(*near, so_far)), (*before, *encoded))
                    self.watch(step, half_made(lm, SideMemory("", None, self.module, self.shape, (*sides, now)), whole))
                with add_to_output(module, stir):
                    logits = lm.target_logits(batch)
                value = self.objective.evaluate(logits, batch.targets, batch.mask, reference)
                apart = margin(distances(*near, change), distances(*far, change), alpha, betas, gamma) / self.unit
                total = value.loss[: len(new)].mean() + (value.loss[len(new) :].mean() if again else 0.0)
                losses.append(value.loss[: len(facts)].mean().item())
                refuse_broken(lm, losses)
                learnt = total.item() < wise.stop or bool(value.finished.all())
                if step == wise.steps or (learnt and apart.item() < wise.stop):
                    break
                (gradient,) = torch.autograd.grad(total + apart.to(total), change)
                gradient = gradient.where(allowed, 0.0)
                if not bool(gradient.any()):
                    break  # all tokens are clipped, and what has never stirred cannot be told where to
                with torch.no_grad():
                    change.sub_(self.rate * (gradient + wise.decay * (main + change)).where(allowed, 0.0))
            return change.detach(), losses

    def _merged(self, sides: list[Side]) -> list[Side]:
        """With the closed shards made one, if they hold enough; their thresholds are taken anew, since other weights stir otherwise."""
        wise = self.method
        closed = [one for one in sides if not one.merged and len(one.texts) >= wise.save_every]
        if sum(len(one.texts) for one in closed) < wise.merge_every or len(closed) < 2:
            return sides
        parts = sides if wise.mode == "merge" else closed
        counts = [float(len(one.texts)) for one in parts]
        change = ties([one.change(self.shape).to(self._device) for one in parts], counts, wise.density)
        texts = tuple(text for one in parts for text in one.texts)
        found = torch.cat([distances(*keys, change) for keys in map(self._keys, _chunks(texts))])
        whole = side(change, change != 0, self._threshold(found), texts, merged=True)
        return [*(one for one in sides if one not in parts), whole]

    def _threshold(self, found: Tensor) -> float:
        """From the distances of a side's questions. Never below α: one that hardly stirs must not open it to everybody."""
        assert self.method.ratio is not None  # for_model filled it in
        return max(self._margins[0], self.method.ratio * float(found.min()))

    def _drawn_mask(self) -> Tensor:
        """The entries [out, in] that a new shard may change: a random subspace of the share `mask`."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.begun)
        self.begun += 1
        return (torch.rand(self.shape, generator=draw) < self.method.mask).to(self._device)

    def _behind_prefixes(self, facts: list[Fact]) -> list[Encoded]:
        """Each prompt behind each text that the model wrote, as it is: braces in one are text."""
        made = []
        for prefix in self.written:
            for fact in facts:
                try:
                    made.append(encode(self.lm.tokenizer, prefix + fact.text, fact.target))
                except ValueError as error:
                    raise FactError(str(error)) from error
                check_length(self.lm, fact, made[-1:])
        return made

    def _own(self, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """`_keys` of the open shard's questions; each is asked once, alone, so that they are the same bits when a sequence goes on."""
        for text in texts:
            if text not in self._kept:
                self._kept[text] = self._keys([text])[0][0].to(self.lm.dtype)
        rows = [self._kept[text] for text in texts]
        there = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        x, asked = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, there))
        return x.to(self._dtype), asked

    def _encoded(self, prompts: Sequence[str]) -> list[Encoded]:
        """As questions, the end of each where it is too long for the model."""
        room = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None) or 10_000
        ids = [encode(self.lm.tokenizer, prompt).ids[-room:] for prompt in prompts]
        return [Encoded(each, len(each)) for each in ids]

    @torch.no_grad()
    def _keys(self, texts: Sequence[Encoded], outputs: bool = False) -> tuple[Tensor, Tensor]:
        """What enters the matrix (or leaves it) while these questions are read [B, T, in], and which tokens are theirs [B, T]."""
        batch = self.lm.batch([Encoded(text.prompt_ids, text.prompt_length) for text in texts])
        with capture(self.lm.model, {"x": self.module}, inputs=not outputs) as seen:
            run_to(self.lm, batch, self.layer)
        x = seen["x"].reshape(len(texts), -1, seen["x"].shape[-1])
        return x.to(self._dtype), batch.attention_mask.bool().to(x.device)

    def _scales(self) -> tuple[float, float]:
        """What the margins are counted in, and the rate of SGD: a step moves an output by rate · ‖x‖² · gradient.

        Relative, that is lr · unit · (unit · gradient), measured on the unedited model over some irrelevant prompts.
        """
        wise = self.method
        assert wise.lr is not None  # for_model filled it in
        if wise.unit is not None:
            return wise.unit, wise.lr
        few = self._encoded(self.prompts[:: max(1, len(self.prompts) // _CHUNK)][:_CHUNK])
        with Stack.of(self.lm).aside_():
            (x, there), (y, _) = self._keys(few), self._keys(few, outputs=True)
        unit = float(y[there].norm(dim=-1).mean())
        return unit, wise.lr * unit**2 / float(x[there].square().sum(-1).mean())

    @property
    def _margins(self) -> tuple[float, float, float]:
        assert self.method.margins is not None and self.method.shrink is not None  # for_model and start filled them in
        alpha, beta, gamma = (self.unit * self.method.shrink * each for each in self.method.margins)
        return alpha, beta, gamma

    @property
    def _dtype(self) -> torch.dtype:
        return master_dtype(matrix(submodule(self.lm.model, self.module)))

    @property
    def _device(self) -> torch.device:
        return matrix(submodule(self.lm.model, self.module)).device

    def state_dict(self) -> dict[str, Any]:
        """The side memory too."""
        return super().state_dict() | {"memory": None if self.memory is None else self.memory.state(), "begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        kept = state["memory"]
        self.memory = kept and SideMemory.restore(kept["settings"], kept["tensors"], kept["id"], kept["parent"])
        self.begun = int(state["begun"])


def _chunks(texts: Sequence[Encoded]) -> list[Sequence[Encoded]]:
    return [texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)]


def _some(items: Sequence[T], count: int, draw: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=draw)[:count].tolist()]
