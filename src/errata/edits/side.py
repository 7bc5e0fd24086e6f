"""A side memory (WISE): a second copy of one matrix that answers the questions which stir it, while the main one answers all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

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
class Side:
    """A side copy W′, kept as its difference from the main W [out, in]: what may differ, and by how much.

    mask: which entries may differ, a bit each, row by row, packed into uint8 [⌈out · in / 8⌉] (`packed`).
    values [n]: W′ - W at these entries, float32 (float64 for float64 weights).
    threshold: it answers questions whose distance is greater.
    texts: the edits' questions with their answers, in order. merged: made of several sides.
    """

    mask: Tensor
    values: Tensor
    threshold: float
    texts: tuple[Encoded, ...]
    merged: bool = False

    def change(self, shape: tuple[int, int]) -> Tensor:
        """W′ - W [out, in], zero outside the mask."""
        full = self.values.new_zeros(math.prod(shape))
        full[unpacked(self.mask, len(full))] = self.values
        return full.view(shape)


def side(change: Tensor, allowed: Tensor, threshold: float, texts: tuple[Encoded, ...], merged: bool = False) -> Side:
    """A side from W′ - W [out, in] and the entries [out, in] bool that may differ."""
    return Side(packed(allowed.flatten()), change[allowed].clone(), threshold, texts, merged)


def packed(bits: Tensor) -> Tensor:
    """Bool [n] as uint8 [⌈n/8⌉], the first in the lowest bit."""
    eights = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpacked(bytes: Tensor, count: int) -> Tensor:
    """The first `count` bits again, bool."""
    return ((bytes[:, None] >> torch.arange(8, dtype=torch.uint8, device=bytes.device)) & 1).flatten()[:count].bool()


def distances(x: Tensor, question: Tensor, change: Tensor) -> Tensor:
    """Δ_act(x) = ‖A(x) (W′ - W)‖₂ of each text [B], the mean over its question's tokens (WISE §2.3.1); differentiable in `change`.

    x [B, T, in]: what enters the matrix; question [B, T] bool; change [out, in]. A text without such a token has 0.
    """
    stirred: Tensor = (x[question] @ change.mT).norm(dim=-1)  # [N], of the questions' tokens alone
    total: Tensor = stirred.new_zeros(len(x)).index_add(0, question.nonzero()[:, 0], stirred)
    return total / question.sum(-1).clamp(min=1)


@dataclass(frozen=True, eq=False)
class SideMemory(Memory):
    """module: path of the matrix that has sides. shape: [out, in]. sides: in the order in which they were begun.

    A question is answered by the side that it stirs most of those that it stirs beyond their thresholds, else by the main weights. That
    is decided once, when it is read, from its own tokens; while its answer is written the decision stays.
    """

    kind: ClassVar[str] = "side"
    id: str
    parent: str | None
    module: str
    shape: tuple[int, int]
    sides: tuple[Side, ...]

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[Callable[[], Tensor | None]]:
        """See `Memory.attached`. Yields a function that says which side answers each text [B] of the last call, -1 for none."""
        try:
            module = submodule(lm.model, self.module)
            found = tuple(matrix(module).shape)
        except (ModelError, AttributeError) as error:
            raise EditError(f"the side memory does not fit {lm.name}: {error}") from error
        if found != self.shape:
            raise EditError(f"the side memory fits a weight {list(self.shape)} (out, in); {self.module!r} of {lm.name} is {list(found)}")
        with reading(lm) as now, ExitStack() as stack:
            routed = _Routed(self, now)
            stack.callback(module.register_forward_hook(routed).remove)
            yield lambda: routed.chosen

    def tensors(self) -> dict[str, Tensor]:
        """mask.k and values.k of each side k."""
        masks = {f"mask.{k}": side.mask for k, side in enumerate(self.sides)}
        return masks | {f"values.{k}": side.values for k, side in enumerate(self.sides)}

    def settings(self) -> dict[str, Any]:
        """See `Memory.settings`."""
        sides = [
            {
                "threshold": side.threshold,
                "merged": side.merged,
                "texts": [{"ids": list(text.ids), "prompt_length": text.prompt_length} for text in side.texts],
            }
            for side in self.sides
        ]
        return {"module": self.module, "shape": list(self.shape), "sides": sides}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], id: str, parent: str | None) -> Self:
        """See `Memory.restore`."""
        sides = tuple(
            Side(
                tensors[f"mask.{k}"],
                tensors[f"values.{k}"],
                kept["threshold"],
                tuple(Encoded(tuple(text["ids"]), text["prompt_length"]) for text in kept["texts"]),
                kept["merged"],
            )
            for k, kept in enumerate(settings["sides"])
        )
        rows, columns = settings["shape"]
        return cls(id, parent, settings["module"], (rows, columns), sides)


class _Routed:
    """A hook on the matrix: decides once for each question which side answers, and adds what that side changes."""

    def __init__(self, memory: SideMemory, now: Callable[[], Reading]) -> None:
        self.chosen: Tensor | None = None  # [B]
        self._now = now
        self._changes = [side.change(memory.shape) for side in memory.sides]
        self._thresholds = [side.threshold for side in memory.sides]

    @torch.no_grad()
    def _route(self, x: Tensor, question: Tensor) -> Tensor:
        stirred = torch.stack([distances(x, question, change) for change in self._changes])  # [K, B]
        beyond = stirred > torch.tensor(self._thresholds, dtype=stirred.dtype, device=x.device)[:, None]
        most = stirred.masked_fill(~beyond, -math.inf).max(0)
        return torch.where(most.values > -math.inf, most.indices, -1)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, plain = self._now(), first(output)
        self._changes = [change.to(plain.device) for change in self._changes]  # themselves, where they are there already
        wide = self._changes[0].dtype
        if args[0].numel() % (len(call.ends) * args[0].shape[-1]):
            raise EditError(f"{len(call.ends)} texts were announced, others are running now; run the whole model, so that they are read")
        x = args[0].reshape(len(call.ends), -1, args[0].shape[-1])  # OPT's MLP runs on [B·T, in]
        if not call.goes_on or self.chosen is None:
            self.chosen = self._route(x.to(wide), call.question.to(x.device))
        if not bool((self.chosen >= 0).any()):
            return None
        out = plain.clone().view(len(x), -1, plain.shape[-1])
        for k, change in enumerate(self._changes):
            rows = (self.chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_put((rows,), (out[rows] + x[rows].to(wide) @ change.mT).to(out.dtype))
        return with_first(output, out.view(plain.shape))
