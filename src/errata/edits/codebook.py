"""A code book beside the weights (MELO): questions near an edited one are answered with that edit's low-rank block, others with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from errata.edits.clusters import Cluster, Member, route
from errata.edits.errors import EditError
from errata.edits.memory import Memory
from errata.lm.anatomy import matrix
from errata.lm.asking import Reading, reading
from errata.lm.capture import first, submodule, with_first
from errata.lm.errors import ModelError
from errata.lm.tokens import Encoded

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What one block adds to each adapted module: y ← y + scale · up down x. down: A [r, in] of each; up: B [out, r] of each."""

    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class CodeBook(Memory):
    """layer: path of the module whose output at the question's last token is the query; it lies below all adapted ones.

    modules: paths of the adapted modules. scale: of every block. radius: that of a new cluster.
    A question's clusters are asked once, when it is read; while its answer is written the decision stays.
    """

    kind: ClassVar[str] = "codebook"
    id: str
    parent: str | None
    layer: str
    modules: tuple[str, ...]
    scale: float
    radius: float
    clusters: tuple[Cluster, ...]
    blocks: tuple[Block, ...]

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[Callable[[], Tensor | None]]:
        """See `Memory.attached`. Yields a function that says which block answers each text [B] of the last call, -1 for none."""
        with Books(lm, [self]).attached() as blocks:
            yield blocks

    @property
    def form(self) -> tuple[str, tuple[str, ...], float, int]:
        """What books that stand side by side have in common, with the rank of their blocks."""
        return self.layer, self.modules, self.scale, len(self.blocks[0].down[0])

    def check(self, lm: LanguageModel) -> None:
        """Raises EditError if the book does not fit the model."""
        try:
            width = matrix(submodule(lm.model, self.layer)).shape[0]
            shapes = [tuple(matrix(submodule(lm.model, path)).shape) for path in self.modules]
        except ModelError as error:
            raise EditError(f"the code book does not fit {lm.name}: {error}") from error
        for path, shape, (down, up) in zip(self.modules, shapes, zip(self.blocks[0].down, self.blocks[0].up, strict=True), strict=True):
            if shape != (up.shape[0], down.shape[1]):
                fits = f"[{up.shape[0]}, {down.shape[1]}]"
                raise EditError(f"the code book's blocks fit a weight {fits} (out, in) at {path!r}; that of {lm.name} is {list(shape)}")
        if width != len(self.clusters[0].centre):
            raise EditError(f"the code book's centres are {len(self.clusters[0].centre)} wide, {self.layer!r} of {lm.name} is {width}")

    def tensors(self) -> dict[str, Tensor]:
        """centres [C, d]; queries [M, d], cluster by cluster; down.j [K, r, in] and up.j [K, out, r] of each adapted module j."""
        found = {
            "centres": torch.stack([cluster.centre for cluster in self.clusters]),
            "queries": torch.stack([member.query for cluster in self.clusters for member in cluster.members]),
        }
        for j in range(len(self.modules)):
            found[f"down.{j}"] = torch.stack([block.down[j] for block in self.blocks])
            found[f"up.{j}"] = torch.stack([block.up[j] for block in self.blocks])
        return found

    def settings(self) -> dict[str, Any]:
        """See `Memory.settings`."""
        clusters = [
            {
                "radius": cluster.radius,
                "label": cluster.label,
                "block": cluster.block,
                "members": [{"ids": list(member.text.ids), "prompt_length": member.text.prompt_length} for member in cluster.members],
            }
            for cluster in self.clusters
        ]
        return {"layer": self.layer, "modules": list(self.modules), "scale": self.scale, "radius": self.radius, "clusters": clusters}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], id: str, parent: str | None) -> Self:
        """See `Memory.restore`."""
        queries = iter(tensors["queries"])
        clusters = tuple(
            Cluster(
                centre,
                kept["radius"],
                kept["label"],
                kept["block"],
                tuple(Member(next(queries), Encoded(tuple(text["ids"]), text["prompt_length"])) for text in kept["members"]),
            )
            for centre, kept in zip(tensors["centres"], settings["clusters"], strict=True)
        )
        modules = tuple(settings["modules"])
        every = range(len(modules))
        blocks = tuple(
            Block(tuple(tensors[f"down.{j}"][k] for j in every), tuple(tensors[f"up.{j}"][k] for j in every))
            for k in range(len(tensors["down.0"]))
        )
        return cls(id, parent, settings["layer"], modules, settings["scale"], settings["radius"], clusters, blocks)


class Books:
    """E code books of one form side by side, each asked about texts of its own. None: one that answers nothing.

    Raises EditError if one does not fit the model, ValueError for books of several forms, or none.
    """

    def __init__(self, lm: LanguageModel, books: Sequence[CodeBook | None]) -> None:
        there = [book for book in books if book is not None]
        if len({book.form for book in there}) != 1:
            raise ValueError("give code books of one layer, the same adapted modules, one scale and one rank")
        for book in there:
            book.check(lm)
        self._lm, (self._layer, self._modules, self._scale, _) = lm, there[0].form
        blocks = [block for book in there for block in book.blocks]
        every = range(len(self._modules))
        self._down = [torch.stack([block.down[j] for block in blocks]) for j in every]  # [K, r, in] of each module
        self._up = [torch.stack([block.up[j] for block in blocks]) for j in every]  # [K, out, r]
        self._clusters: list[tuple[int, Cluster, int]] = []  # the number of its book, itself, and its block among all
        first_block = 0
        for number, own in enumerate(books):
            if own is not None:
                self._clusters += [(number, cluster, first_block + cluster.block) for cluster in own.clusters]
                first_block += len(own.blocks)

    @contextmanager
    def attached(self, owners: Sequence[int] | None = None) -> Iterator[Callable[[], Tensor | None]]:
        """While it lasts, text b of each batch that runs (of so many) is answered by books[owners[b]]; None: every text by all of them.

        Yields a function that says which of all blocks answers each text [B] of the last call, -1 for none. Raises EditError, while the
        model runs, for a batch of another size.
        """
        with reading(self._lm) as now, ExitStack() as stack:
            asked = _Asked(self._clusters, now, owners)
            stack.callback(submodule(self._lm.model, self._layer).register_forward_hook(asked).remove)
            stack.enter_context(answering(self._lm, self._modules, self._down, self._up, self._scale, lambda: asked.blocks))
            yield lambda: asked.blocks


class _Asked:
    """A hook on the code-book layer: which block answers each text of the call, once for each question."""

    def __init__(self, clusters: Sequence[tuple[int, Cluster, int]], now: Callable[[], Reading], owners: Sequence[int] | None) -> None:
        self.blocks: Tensor | None = None  # [B]
        self._now = now
        self._centres = torch.stack([cluster.centre for _, cluster, _ in clusters])
        self._radii = torch.tensor([cluster.radius for _, cluster, _ in clusters])
        self._block_of = torch.tensor([*(block for _, _, block in clusters), -1])  # index -1 is the last
        self._among: Tensor | None = None  # [B, C] whether a text's book has the cluster
        if owners is not None:
            self._among = torch.tensor(list(owners))[:, None] == torch.tensor([number for number, _, _ in clusters])

    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        call, out = self._now(), first(output).detach()
        if call.goes_on and self.blocks is not None:
            return
        out = out.reshape(len(call.ends), -1, out.shape[-1])  # OPT's MLP runs on [B·T, d]
        queries = out[torch.arange(len(out), device=out.device), call.ends.to(out.device)]  # [B, d]
        if self._centres.device != out.device:
            self._centres, self._radii, self._block_of = (t.to(out.device) for t in (self._centres, self._radii, self._block_of))
            self._among = None if self._among is None else self._among.to(out.device)
        if self._among is not None and len(self._among) != len(queries):
            raise EditError(f"code books side by side were told about {len(self._among)} texts, but {len(queries)} are running")
        self.blocks = self._block_of[route(self._centres, self._radii, queries, self._among)]


@contextmanager
def answering(
    lm: LanguageModel,
    modules: Sequence[str],
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scale: float,
    rows: Callable[[], Tensor | None],
) -> Iterator[None]:
    """While it lasts, each text that runs is answered with one of K blocks; differentiable in them.

    down [K, r, in] and up [K, out, r] of each of `modules`; rows: gives the block of each text [B], -1 for none (its states then stay as
    they are), or None for none at all.
    """

    def adds(a: Tensor, b: Tensor) -> Callable[..., Any]:
        places: dict[torch.device, tuple[Tensor, Tensor]] = {}

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            plain, which = first(output), rows()
            if which is None or not bool((which >= 0).any()):
                return None
            if args[0].numel() % (len(which) * args[0].shape[-1]):
                raise EditError(
                    f"the code book decided about {len(which)} texts, others are running now; run the whole model, so that it is asked"
                )
            which = which.to(plain.device)
            if plain.device not in places:
                places[plain.device] = a.to(plain.device), b.to(plain.device)
            here_a, here_b = (block[which.clamp(min=0)] for block in places[plain.device])  # [B, r, in], [B, out, r]
            x = args[0].reshape(len(which), -1, args[0].shape[-1]).to(here_a.dtype)  # [B, T, in]
            change = torch.bmm(torch.bmm(x, here_a.mT), here_b.mT) * scale
            change = torch.where(which[:, None, None] >= 0, change, 0.0)
            return with_first(output, plain + change.reshape(plain.shape).to(plain.dtype))

        return hook

    with ExitStack() as stack:
        for path, a, b in zip(modules, down, up, strict=True):
            stack.callback(submodule(lm.model, path).register_forward_hook(adds(a, b)).remove)
        yield
