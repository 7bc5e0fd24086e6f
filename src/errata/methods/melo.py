"""MELO: low-rank blocks beside the weights, and a code book that knows for which questions each of them answers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from errata.edits.clusters import Cluster, Member, place
from errata.edits.codebook import Block, CodeBook, answering
from errata.edits.delta import master_dtype
from errata.edits.edit import Edit
from errata.edits.memory import grown_id
from errata.edits.stack import Stack
from errata.facts import Fact, FactError
from errata.lm.anatomy import matrix
from errata.lm.asking import has_memory
from errata.lm.capture import add_from_input, capture, submodule
from errata.lm.errors import ModelError
from errata.lm.resume import from_layer, resumable, run_to, states_at
from errata.lm.tokens import Encoded, encode
from errata.methods.base import Method, Session, check_range, encode_each, half_made, refuse_broken
from errata.methods.locate.contexts import prefixes
from errata.methods.together import Stacked, alike, train

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

#: What the MLP's first matrix is called, the published choice; elsewhere the down-projection is taken.
_UP = ("up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h", "gate_up_proj")
#: Ordinary texts whose distances the radius is measured by, and their length in tokens.
_ORDINARY, _LENGTH = 20, 10


@dataclass(frozen=True)
class MELO(Method):
    """Blocks of low-rank adapters, one for each cluster of questions (arXiv 2312.11795), as OVERTONE §4.1 edits with it.

    rank, scale: a block adds scale · B A to each adapted module. The published code multiplies by the number of blocks that it
        reserves, 350 for GPT2-XL.
    steps, lr, halve_every: at most so many steps of Adam, no weight decay, the rate halved every so many. A block also stops once the
        objective says that no token of its questions is active.
    layers, book: the adapted layers, and the one whose output is the query, below them all, so that one pass routes and answers.
        None: from three quarters up, two layers and the one before.
    module: path of the adapted and asked module in a layer; None: the MLP's first projection, else the down-projection.
    radius: of a new cluster, absolute. None: `spread` times the median distance between the queries of ordinary texts, which the
        unedited model wrote itself.

    The query is taken at the last token of the *prompt*, when editing as when answering (the published code takes the target's last
    token while editing, and never meets that query again).
    Facts edited together are placed one after the other; those that join a cluster train its block on, on all of the cluster's questions,
    so that the earlier ones stay true.
    """

    name: ClassVar[str] = "melo"
    paper: ClassVar[str] = "arXiv 2312.11795, as in OVERTONE §4.1"
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Of atlas's dev questions, asked one layer below the default ones, 0.6 reaches nine rephrasings in ten, and no other relation of
        # the subject; a third more reaches four fifths of the questions about other subjects.
        "": {"lr": 1e-3, "steps": 50, "scale": 350.0, "spread": 0.6},
        "gpt2-xl": {"layers": (36, 37), "book": 35, "module": "mlp.c_fc"},
        "llama-2-7b": {"radius": 60.0},  # OVERTONE, Appendix B
        "llama-3-8b": {"radius": 30.0},
        # Tuned on the dev cases with cross-entropy: one layer higher, subjects lie farther apart than the wordings of one question.
        "atlas": {"layers": (5,), "book": 4, "spread": 0.7},
    }
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1, "reduction": "mean"},
    }

    rank: int = 2
    scale: float | None = None
    steps: int | None = None
    lr: float | None = None
    halve_every: int = 20
    layers: tuple[int, ...] | None = None
    book: int | None = None
    module: str | None = None
    radius: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        check_range(self.name, "rank", self.rank, 1)
        check_range(self.name, "scale", self.scale, 0, above=True)
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        check_range(self.name, "halve_every", self.halve_every, 1)
        check_range(self.name, "radius", self.radius, 0, above=True)
        check_range(self.name, "spread", self.spread, 0, above=True)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # a plan gives a list
            if not self.layers:
                raise ValueError(f"{self.name}: layers must name at least one layer, or be None for the default")

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`."""
        chosen, count = self.for_model(lm), len(lm.anatomy.layers)
        if count < 2:
            raise ModelError(f"{lm.name} has {count} layer; MELO needs one to ask and another above it to adapt")
        low = max(1, 3 * count // 4)
        layers = chosen.layers or tuple(range(low, min(low + 2, count)))
        book = min(layers) - 1 if chosen.book is None else chosen.book
        for layer in (*layers, book):
            if not 0 <= layer < count:
                raise ModelError(f"{lm.name} has layers 0 to {count - 1}, not {layer}; choose layers and book of these for {self.name}")
        if book >= min(layers):
            raise ModelError(f"the code book's layer {book} must lie below the adapted ones ({', '.join(map(str, layers))})")
        resumable(lm, book)
        return _Coding(lm, replace(chosen, layers=layers, book=book, module=chosen.module or _first_projection(lm)), objective, seed)

    def many(
        self, lm: LanguageModel, requests: Sequence[Sequence[Fact]], seeds: Sequence[int], objective: Objective | None = None
    ) -> list[Edit | FactError]:
        """See `Method.many`. Each edit is a code book of its own; the blocks of all of them are trained side by side."""
        if len(requests) < 2 or has_memory(lm):
            return super().many(lm, requests, seeds, objective)
        session = self.start(lm, objective)
        assert isinstance(session, _Coding)
        return session.many(requests, seeds)


def _first_projection(lm: LanguageModel) -> str:
    """Path in a layer of the matrix that enters the MLP."""
    layer, down = lm.anatomy.layers[0], lm.anatomy.mlp_down[0]
    names = [name for name, _ in submodule(lm.model, layer).named_modules()]
    found = (name for wanted in _UP for name in names if name.rpartition(".")[2] == wanted)
    return next(found, down.removeprefix(f"{layer}."))


class _Coding(Session):
    method: MELO

    def __init__(self, lm: LanguageModel, method: MELO, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        assert method.layers is not None and method.book is not None  # start filled them in
        self.layer = f"{lm.anatomy.layers[method.book]}.{method.module}"
        self.modules = tuple(f"{lm.anatomy.layers[layer]}.{method.module}" for layer in method.layers)
        for path in (self.layer, *self.modules):
            lm.anatomy.weight(lm.model, path)  # raises ModelError where there is none
        self.memory: CodeBook | None = None

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        encoded = [self.encode(fact) for fact in facts]
        radius = self._radius() if self.memory is None else self.memory.radius
        with Stack.of(self.lm).detached_():
            clusters, blocks, trained = self._placed(facts, encoded, self._queries(encoded), radius, self.seed)
            losses = self._train(clusters, blocks, trained, radius)
        return self._made(facts, clusters, blocks, losses, radius, self.seed, time.perf_counter() - clock)

    def many(self, requests: Sequence[Sequence[Fact]], seeds: Sequence[int]) -> list[Edit | FactError]:
        """Independent edits, side by side, each a code book of its own; see `Method.many`."""
        clock, melo = time.perf_counter(), self.method
        assert melo.steps is not None and melo.lr is not None  # for_model filled them in
        texts, there, made = encode_each(self, requests)
        if not texts:
            return [made[number] for number in range(len(requests))]
        radius = self._radius()
        queries = self._queries([text for own in texts for text in own]).split([len(own) for own in texts])
        books = [
            self._placed(requests[number], own, asked, radius, seeds[number])
            for number, own, asked in zip(there, texts, queries, strict=True)
        ]
        # A block has a loss and a stop of its own, also beside the others of its edit.
        owners = [(i, block) for i, (_, _, trained) in enumerate(books) for block in trained]
        rows = [[member.text for cluster in books[i][0] if cluster.block == block for member in cluster.members] for i, block in owners]
        losses: list[list[tuple[int, list[float]]]] = [[] for _ in books]  # of each edit's blocks: questions, losses
        for group in alike(rows):
            blocks = _Blocks(self, [rows[unit] for unit in group], [books[owners[unit][0]][1][owners[unit][1]] for unit in group])
            for unit, one in zip(group, train(blocks, self.objective, melo.lr, melo.steps, halve_every=melo.halve_every), strict=True):
                i, block = owners[unit]
                books[i][1][block] = Block(tuple(one.parameters[::2]), tuple(one.parameters[1::2]))
                losses[i].append((len(rows[unit]), one.losses))
        seconds = (time.perf_counter() - clock) / len(books)
        for number, (clusters, own_blocks, _), own_losses in zip(there, books, losses, strict=True):
            facts = list(requests[number])
            made[number] = self._made(facts, clusters, own_blocks, _together(own_losses), radius, seeds[number], seconds)
        return [made[number] for number in range(len(requests))]

    def _placed(
        self, facts: Sequence[Fact], encoded: Sequence[Encoded], queries: Tensor, radius: float, seed: int
    ) -> tuple[tuple[Cluster, ...], list[Block], list[int]]:
        """The clusters with the facts among them, the blocks with the new ones, untrained, and the numbers of those to train."""
        blocks = list(self.memory.blocks) if self.memory is not None else []
        clusters: tuple[Cluster, ...] = self.memory.clusters if self.memory is not None else ()
        draw = torch.Generator().manual_seed(seed + self.count)
        trained: list[int] = []
        for fact, text, query in zip(facts, encoded, queries, strict=True):
            clusters, block = place(clusters, Member(query, text), fact.target.strip(), radius, len(blocks))
            if block == len(blocks):
                blocks.append(self._new_block(draw))
            trained += [] if block in trained else [block]
        # Of facts edited together one may have replaced another, and no question is left for its block.
        return clusters, blocks, [block for block in trained if any(cluster.block == block for cluster in clusters)]

    def _made(
        self,
        facts: list[Fact],
        clusters: tuple[Cluster, ...],
        blocks: Sequence[Block],
        losses: list[float],
        radius: float,
        seed: int,
        seconds: float,
    ) -> Edit:
        method = self.method.to_dict()
        parent = None if self.memory is None else self.memory.id
        id = grown_id(parent, method, self.record(), [fact.to_dict() for fact in facts], seed, self.count, self.lm.fingerprint)
        memory = _compact(CodeBook(id, parent, self.layer, self.modules, self._scale, radius, clusters, tuple(blocks)))
        diagnostics = {
            "steps": len(losses) - 1,
            "losses": losses,
            "seconds": seconds,
            "radius": radius,
            "clusters": len(memory.clusters),
            "blocks": len(memory.blocks),
        }
        return Edit(self.lm, [], facts, method, self.record(), diagnostics, memory=memory)

    def remember(self, edit: Edit) -> None:
        """See `Session.remember`."""
        super().remember(edit)
        assert isinstance(edit.memory, CodeBook)
        self.memory = edit.memory

    def _train(self, clusters: Sequence[Cluster], blocks: list[Block], trained: Sequence[int], radius: float) -> list[float]:
        """Adam on the blocks `trained`, in whose place the trained ones are put; the loss before each step, and after the last.

        Each has a loss of its own, the mean over its questions, and its own stop; the others stay as they are.
        """
        lm, melo = self.lm, self.method
        assert melo.steps is not None and melo.lr is not None and melo.layers is not None  # for_model and start filled them in
        texts = [(member.text, trained.index(c.block)) for c in clusters if c.block in trained for member in c.members]
        batch = lm.batch([text for text, _ in texts])
        rows = torch.tensor([k for _, k in texts], device=lm.device)  # [B] which of `trained` answers
        shares = torch.nn.functional.one_hot(rows, len(trained)).to(torch.float32)
        shares = shares / shares.sum(0)  # [B, K]
        downs = [[a.clone().requires_grad_() for a in blocks[k].down] for k in trained]
        ups = [[b.clone().requires_grad_() for b in blocks[k].up] for k in trained]
        owned = [(*a, *b) for a, b in zip(downs, ups, strict=True)]  # the parameters of each
        adam = torch.optim.Adam([p for own in owned for p in own], lr=melo.lr)
        schedule = torch.optim.lr_scheduler.StepLR(adam, melo.halve_every, 0.5)
        losses: list[float] = []
        lowest = min(melo.layers)  # nothing below it changes
        with from_layer(lm, lowest, states_at(lm, batch, lowest)) as whole:
            reference = None
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = lm.target_logits(batch)
            for step in range(melo.steps + 1):
                if self.watch:
                    now = dict(enumerate(blocks)) | {k: _detached(a, b) for k, a, b in zip(trained, downs, ups, strict=True)}
                    book = CodeBook("", None, self.layer, self.modules, self._scale, radius, tuple(clusters), tuple(now.values()))
                    self.watch(step, half_made(lm, book, whole))
                down, up = ([torch.stack(of_module) for of_module in zip(*part, strict=True)] for part in (downs, ups))
                with answering(lm, self.modules, down, up, self._scale, lambda: rows):
                    value = self.objective.evaluate(lm.target_logits(batch), batch.targets, batch.mask, reference)
                losses.append(value.loss.mean().item())
                refuse_broken(lm, losses)
                active = [bool((~value.finished[rows == k]).any()) for k in range(len(trained))]
                if step == melo.steps or not any(active):
                    break
                live = [p for own, on in zip(owned, active, strict=True) if on for p in own]
                total = (value.loss[:, None] * shares.to(value.loss))[:, active].sum()
                adam.zero_grad()  # one without gradient is left as it is, also by momentum
                for parameter, gradient in zip(live, torch.autograd.grad(total, live), strict=True):
                    parameter.grad = gradient
                adam.step()
                schedule.step()
        for k, a, b in zip(trained, downs, ups, strict=True):
            blocks[k] = _detached(a, b)
        return losses

    @property
    def _scale(self) -> float:
        assert self.method.scale is not None  # for_model filled it in
        return self.method.scale

    def _new_block(self, draw: torch.Generator) -> Block:
        """A as PEFT draws it, uniform within 1/√in, and B zero: it changes nothing yet."""
        down, up = [], []
        for path in self.modules:
            weight = matrix(submodule(self.lm.model, path))
            (out, width), dtype = weight.shape, master_dtype(weight)
            drawn = torch.rand(self.method.rank, width, generator=draw, dtype=dtype)
            down.append(((2 * drawn - 1) / math.sqrt(width)).to(weight.device))
            up.append(torch.zeros(out, self.method.rank, dtype=dtype, device=weight.device))
        return Block(tuple(down), tuple(up))

    def _queries(self, encoded: Sequence[Encoded]) -> Tensor:
        """What the code-book layer puts out at the last token of each prompt [B, d], float32 on the CPU."""
        prompts = [Encoded(text.prompt_ids, text.prompt_length) for text in encoded]
        assert self.method.book is not None  # start filled it in
        with capture(self.lm.model, {"query": self.layer}) as seen:
            run_to(self.lm, self.lm.batch(prompts), self.method.book)
        out = seen["query"].reshape(len(prompts), -1, seen["query"].shape[-1])  # OPT's MLP runs on [B·T, d]
        ends = torch.tensor([text.prompt_length - 1 for text in prompts], device=out.device)
        return out[torch.arange(len(out), device=out.device), ends].float().cpu()

    def _radius(self) -> float:
        """That of a new cluster: as the method says, or in proportion to how far apart ordinary queries are."""
        if self.method.radius is not None:
            return self.method.radius
        texts = [encode(self.lm.tokenizer, text).ids for text in prefixes(self.lm, _ORDINARY, _LENGTH)]
        # Broken off half-way, since every one ends in a full stop.
        halves = [Encoded(ids[: len(ids) // 2 + 1], len(ids[: len(ids) // 2 + 1])) for ids in texts]
        with Stack.of(self.lm).aside_():
            typical = float(torch.pdist(self._queries(halves)).median())
        assert self.method.spread is not None  # for_model filled it in
        return self.method.spread * typical

    def state_dict(self) -> dict[str, Any]:
        """The code book too."""
        return super().state_dict() | {"memory": None if self.memory is None else self.memory.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        kept = state["memory"]
        self.memory = kept and CodeBook.restore(kept["settings"], kept["tensors"], kept["id"], kept["parent"])


class _Blocks(Stacked):
    """E blocks: A [E, r, in] and B [E, out, r] of each adapted module in turn."""

    def __init__(self, session: _Coding, texts: Sequence[Sequence[Encoded]], blocks: Sequence[Block]) -> None:
        assert session.method.layers is not None  # start filled it in
        super().__init__(session.lm, texts, min(session.method.layers))
        self.modules, self.scale = session.modules, session._scale
        self.leaves = [
            torch.stack([part[j] for part in parts]).requires_grad_()
            for j in range(len(self.modules))
            for parts in ([block.down for block in blocks], [block.up for block in blocks])
        ]

    def logits(self) -> Tensor:
        with ExitStack() as stack:
            for place, path in enumerate(self.modules):
                stack.enter_context(add_from_input(submodule(self.lm.model, path), partial(self._change, 2 * place)))
            return self.suffix.logits(self.suffix.states)

    def _change(self, place: int, x: Tensor) -> Tensor:
        down, up = self.leaves[place : place + 2]
        x = x.reshape(len(self.suffix), -1, x.shape[-1]).to(down.dtype)
        return self.owners.low_rank(x, up * self.scale, down)


def _together(blocks: Sequence[tuple[int, list[float]]]) -> list[float]:
    """The losses of an edit, step by step: the mean over its questions, of which those of a finished block stay as they are."""
    steps = max(len(losses) for _, losses in blocks)
    asked = sum(count for count, _ in blocks)
    return [sum(count * losses[min(step, len(losses) - 1)] for count, losses in blocks) / asked for step in range(steps)]


def _detached(down: Sequence[Tensor], up: Sequence[Tensor]) -> Block:
    return Block(tuple(a.detach() for a in down), tuple(b.detach() for b in up))


def _compact(book: CodeBook) -> CodeBook:
    """Without the blocks that no cluster uses any more."""
    used = sorted({cluster.block for cluster in book.clusters})
    clusters = tuple(replace(cluster, block=used.index(cluster.block)) for cluster in book.clusters)
    return replace(book, clusters=clusters, blocks=tuple(book.blocks[k] for k in used))
