"""What is being asked while the model runs: where each text's question ends, whether a text goes on that was read before, and what
stands in front of every question.

A memory beside the weights decides once for each question what answers it, from the question's own tokens, so that the decision is the
same whether the answer is scored (its tokens stand behind the question) or written (they come one by one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.lm.tokens import Encoded

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

_ENDS, _PREFACE, _READERS = "errata_ends", "errata_preface", "errata_readers"

Preface = Callable[[Encoded], Encoded]
"""A text as it is to be read, with something in front of its question (the same target; `prompt_length` and the subject move along)."""


@dataclass(slots=True)
class Reading:
    """One call of the model on B texts of T tokens.

    ends [B]: column of each question's last token. question [B, T] bool: the question's tokens, without padding and answer.
    goes_on: the texts were read before, up to here, and `ends` and `question` are those of that call (its T, not this one's).
    """

    ends: Tensor
    question: Tensor
    goes_on: bool = False


@contextmanager
def asking(lm: LanguageModel, ends: Tensor) -> Iterator[None]:
    """While it lasts, the questions of the texts that run end in these columns [B]."""
    before = vars(lm.model).get(_ENDS)
    vars(lm.model)[_ENDS] = ends
    try:
        yield
    finally:
        vars(lm.model)[_ENDS] = before


@contextmanager
def reading(lm: LanguageModel) -> Iterator[Callable[[], Reading]]:
    """While it lasts, what is yielded says of the call that is under way, or was the last, which questions it reads.

    Where nobody said where they end (a bare `model.generate`, a pipeline), the whole text is the question.
    """
    now: list[Reading] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs["inputs_embeds"]
        rows, width = given.shape[:2]
        past = kwargs.get("past_key_values")
        read = 0 if past is None else int(past.get_seq_length())
        if read and now and len(now[0].ends) == rows:
            now[0].goes_on = True
            return
        mask = kwargs.get("attention_mask")
        there = torch.ones(rows, width, dtype=torch.bool, device=given.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            there = mask[:, -width:].bool()
        columns = torch.arange(width, device=given.device)
        ends = vars(lm.model).get(_ENDS)
        if ends is None or len(ends) != rows:
            ends = torch.where(there, columns, -1).amax(-1)
        now[:] = [Reading(ends.to(given.device), there & (columns <= ends.to(given.device)[:, None]))]

    handle = lm.model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    kept = vars(lm.model)
    kept[_READERS] = kept.get(_READERS, 0) + 1
    try:
        yield lambda: now[0]
    finally:
        kept[_READERS] -= 1
        handle.remove()


def has_memory(lm: LanguageModel) -> bool:
    """Whether something beside the weights has a say in what the model answers."""
    return bool(vars(lm.model).get(_READERS)) or vars(lm.model).get(_PREFACE) is not None


@contextmanager
def prefacing(lm: LanguageModel, preface: Preface) -> Iterator[None]:
    """While it lasts, `lm.batch` and `lm.generate` read every text as `preface` gives it."""
    with ExitStack() as stack:
        kept = vars(lm.model)
        stack.callback(kept.__setitem__, _PREFACE, kept.get(_PREFACE))
        kept[_PREFACE] = preface
        yield


def prefaced(lm: LanguageModel, encoded: list[Encoded]) -> list[Encoded]:
    """The texts as they are to be read; themselves where nothing stands in front."""
    preface: Preface | None = vars(lm.model).get(_PREFACE)
    return encoded if preface is None else [preface(text) for text in encoded]
