"""Facts as notes in the prompt: what a question is about is looked up and stands in front of it; no weight changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from errata.edits.errors import EditError
from errata.edits.memory import Memory
from errata.facts import Fact
from errata.lm.asking import prefacing
from errata.lm.resume import states_at
from errata.lm.tokens import Encoded, collate, decode, encode, joint

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

By = Literal["bm25", "embedding"]

ROOM = 32
"""Tokens that are left free behind a question, for its answer."""


@dataclass(frozen=True, eq=False)
class Notes(Memory):
    """N facts, and how those that a question is about are found and put.

    facts: each prompt once; what was noted last holds.
    by: "bm25": among the facts whose subject the question names, those of the best BM25 score. "embedding": those whose prompt's
        states are most like the question's (cosine).
    k: at most so many notes for a question; the best one stands next to it.
    threshold: a fact is passed over below this share of its subject's words in the question (of its prompt's words, where it has no
        subject), for "embedding" below this cosine. Where all are, the question is read as it is.
    form: how a note is put: what replaces `{}` is the fact's sentence, "The capital of France is Lyon.".
    layer: the states that enter it are compared; vectors [N, d]: their means over the facts' prompts. For "embedding" only.
    """

    kind: ClassVar[str] = "notes"

    facts: tuple[Fact, ...]
    by: By
    k: int
    threshold: float
    form: str
    id: str
    parent: str | None = None
    layer: int | None = None
    vectors: Tensor | None = None

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        """See `Memory.attached`."""
        size = lm.model.config.get_text_config().hidden_size
        if self.vectors is not None and self.vectors.shape != (len(self.facts), size):
            raise EditError(f"the notes' vectors are {list(self.vectors.shape)}, {lm.name} has states of {size}; load their model")
        if self.by == "bm25":
            _ = self._index  # what is missing says so now, not at the first question
        with prefacing(lm, lambda text: self.preface(lm, text)):
            yield

    def preface(self, lm: LanguageModel, text: Encoded) -> Encoded:
        """The text with the notes on its question in front; the text itself where there are none, or none that the model has room for."""
        own = text.prompt_ids[len(_prefix(lm)) :] if text.prompt_ids[: len(_prefix(lm))] == _prefix(lm) else text.prompt_ids
        question = decode(lm.tokenizer, own)
        limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
        found = self.find(lm, question)
        while found:
            notes = "".join(self.form.replace("{}", sentence(fact)) for fact in reversed(found))
            put = _in_front(lm, notes, question, own, text)
            if limit is None or put.prompt_length + max(ROOM, len(text.target_ids)) <= limit:
                return put
            found.pop()  # the one that fits the question least
        return text

    def find(self, lm: LanguageModel, question: str) -> list[Fact]:
        """The facts that a question is about, the best first; at most k."""
        if self.by == "bm25":
            asked = words(question)
            said = set(asked)
            passed = torch.tensor([_share(wanted, said) for wanted in self._wanted]) >= self.threshold
            scores = torch.from_numpy(self._index.get_scores(asked)) if asked else torch.zeros(len(self.facts))
        else:
            assert self.layer is not None and self.vectors is not None
            scores = F.cosine_similarity(self.vectors.to(lm.device), embed(lm, [question], self.layer)).cpu()
            passed = scores >= self.threshold
        order = scores.argsort(descending=True, stable=True).tolist()
        return [self.facts[i] for i in order if passed[i]][: self.k]

    @cached_property
    def _wanted(self) -> list[list[str]]:
        """What a question must say to be about each fact."""
        return [words(fact.subject) or words(fact.text) for fact in self.facts]

    @cached_property
    def _index(self) -> Any:
        """BM25 (Robertson et al. 1994, as Lucene computes it) over the facts' sentences."""
        try:
            import bm25s
        except ImportError as error:
            raise EditError(
                "notes are found with the package bm25s, which is not installed; run: pip install bm25s, or choose by='embedding'"
            ) from error
        index = bm25s.BM25(method="lucene")
        index.index([words(sentence(fact)) for fact in self.facts], show_progress=False)
        return index

    def tensors(self) -> dict[str, Tensor]:
        """See `Memory.tensors`."""
        return {} if self.vectors is None else {"vectors": self.vectors}

    def settings(self) -> dict[str, Any]:
        """See `Memory.settings`."""
        own = {"by": self.by, "k": self.k, "threshold": self.threshold, "form": self.form, "layer": self.layer}
        return own | {"facts": [fact.to_dict() for fact in self.facts]}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], id: str, parent: str | None) -> Self:
        """See `Memory.restore`."""
        facts = tuple(Fact.from_dict(fact) for fact in settings["facts"])
        return cls(**{**settings, "facts": facts}, id=id, parent=parent, vectors=tensors.get("vectors"))


def sentence(fact: Fact) -> str:
    """A fact as a statement: prompt, target, full stop."""
    target = fact.target.rstrip()
    end = "" if target.endswith((".", "!", "?", "。")) else "." if joint("a", target[-1]) else "。"
    return f"{fact.text}{joint(fact.text, target)}{target}{end}"


def words(text: str) -> list[str]:
    """Lower-case words; of a script that writes no spaces between them, characters."""
    runs = re.findall(r"\w+", text.casefold())
    return [word for run in runs for word in ([run] if joint("a", run) else run)]


@torch.no_grad()
def embed(lm: LanguageModel, texts: Sequence[str], layer: int) -> Tensor:
    """Mean over a text's tokens of the states that enter `layer` [N, d], as the model is now; the special prefix has no part in it."""
    rows = []
    for text in texts:  # one by one: a vector must not depend on what else is asked
        states = states_at(lm, collate([encode(lm.tokenizer, text)], lm.pad_id).to(lm.device), layer)[0]  # [T, d]
        rows.append(states[len(_prefix(lm)) :].to(torch.float32).mean(0))
    return torch.stack(rows)


def _share(wanted: Sequence[str], said: set[str]) -> float:
    """How many of the wanted words are said, as a fraction."""
    return sum(word in said for word in wanted) / len(wanted) if wanted else 0.0


def _prefix(lm: LanguageModel) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before every text."""
    encoding = lm.tokenizer("a", return_special_tokens_mask=True)
    special = [*encoding["special_tokens_mask"], 0]
    return tuple(encoding["input_ids"][: special.index(0)])


def _in_front(lm: LanguageModel, notes: str, question: str, own: tuple[int, ...], text: Encoded) -> Encoded:
    """`text` with `notes` before its question, which is tokenised as it stands there: behind "… Lyon. " comes "␣The", not "The".

    Where that would touch the subject's last token, or the question's ids do not spell the question, they stay as they were.
    """
    ids = encode(lm.tokenizer, notes + question).ids
    same = next((i for i, (a, b) in enumerate(zip(reversed(ids), reversed(own), strict=False)) if a != b), min(len(ids), len(own)))
    needed = 1 if text.subject_last is None else text.prompt_length - text.subject_last
    if same < needed:
        ids = (*encode(lm.tokenizer, notes).ids, *own)
    moved = len(ids) - text.prompt_length
    return replace(
        text,
        ids=(*ids, *text.target_ids),
        prompt_length=len(ids),
        subject_last=None if text.subject_last is None else text.subject_last + moved,
    )
