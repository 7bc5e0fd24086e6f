"""Questions answered in the model's own words, one hop and several hops away from an edit (MQuAKE; OVERTONE, Appendix B.2).

The model is shown one example and the question, and writes up to 30 tokens (one hop) or 200 (several hops, thought through step by step) at
temperature 0.1. A question is answered if the answer or an alias stands in what comes, for any of the question's wordings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from errata.facts import EditCase, Question
from errata.lm import LanguageModel
from errata.metrics.framing import chats, turn
from errata.metrics.normalise import contains

TEMPERATURE = 0.1
ONE_HOP_TOKENS, MULTI_HOP_TOKENS = 30, 200
BATCH_SIZE = 32
CODE = 3
"""Answers of up to so many letters may be codes, see `answered`."""

# The two prompts are the paper's, to the letter (Appendix B.2): part of what is measured.
ONE_HOP = """\
You are a helpful AI assistant. Answer questions directly.
Always format your response as:
Final answer: [concise and direct final answer]
Question: Who is the spouse of the head of state in United States of America?
Answer: Jill Biden
Question: {}
Answer:"""

MULTI_HOP = """\
You are a helpful AI assistant. For each question:

1. Break it down into simpler subquestions
2. Answer each subquestion step by step.
3. Use your answers to provide a final answer after "Final answer: "

Always format your response as:
Subquestion: [your subquestion]
Generated answer: [your answer]
Final answer: [concise and direct final answer]

Question: Who is the spouse of the head of state in United States of America?
Subquestion: Who is the head of state in United States of America?
Answer: The head of state in United States of America is Joe Biden.
Subquestion: Who is the spouse of Joe Biden?
Answer: The spouse of Joe Biden is Jill Biden.
Final answer: Jill Biden

Question: {}"""


@dataclass(frozen=True, slots=True)
class Reply:
    """One wording of a question, what the model wrote (the new text alone), and whether an answer stands in it."""

    wording: str
    text: str
    right: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the replies to its wordings, in their order."""

    question: Question
    replies: tuple[Reply, ...]

    @property
    def right(self) -> bool:
        return any(reply.right for reply in self.replies)


@dataclass(frozen=True, slots=True)
class MultiHopScore:
    """The questions of one case.

    temperature, chat: how they were put, with the tokenizer's chat template or without.
    """

    id: str
    asked: tuple[Asked, ...]
    temperature: float
    chat: bool

    @property
    def metrics(self) -> dict[str, float]:
        """Shares of the case's questions that are answered; a name without questions is absent.

        one_hop: direct questions about what was edited (B.2: "related to the new knowledge"). one_hop_all: with those about the
            other facts on the way, which the model knew or did not.
        multi_hop: questions of two hops or more; hops_2, hops_3, …: of so many.
        """
        shares: dict[str, list[bool]] = {}
        for one in self.asked:
            hops = one.question.hops
            several = ["multi_hop", f"hops_{hops}"]
            for name in several if hops > 1 else ["one_hop", "one_hop_all"] if one.question.edited else ["one_hop_all"]:
                shares.setdefault(name, []).append(one.right)
        return {name: fmean(values) for name, values in shares.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the value of a record's field "questions", as `summarise` reads it."""
        asked = [
            {"hops": one.question.hops, "edited": one.question.edited, "answers": list(one.question.answers), "right": one.right}
            | {"replies": [asdict(reply) for reply in one.replies]}
            for one in self.asked
        ]
        return {**self.metrics, "temperature": self.temperature, "chat": self.chat, "asked": asked}


def score(
    lm: LanguageModel,
    case: EditCase,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    chat: str = "auto",
    batch_size: int = BATCH_SIZE,
) -> MultiHopScore:
    """What the model answers to the case's questions; see `score_all`."""
    return score_all(lm, [case], seed, temperature, chat, batch_size)[0]


def score_all(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    seed: int = 0,
    temperature: float = TEMPERATURE,
    chat: str = "auto",
    batch_size: int = BATCH_SIZE,
) -> list[MultiHopScore]:
    """The same for cases that are measured on the same model, in their order.

    seed: with it, each wording is sampled in its own way, whatever else is asked and whatever was edited. temperature: 0 is greedy.
    chat: "auto", "on" or "off", see `errata.metrics.framing`; a template gets the whole prompt as the user's turn.

    Neither line breaks nor the answer's length end a reply, only the end token and the limit (30 and 200 tokens).
    Raises ModelError for a question that, with its example, is longer than the model can take; ValueError for an unknown `chat`.
    """
    templated = chats(lm.tokenizer, chat)
    questions = [question for case in cases for question in case.questions]
    texts: dict[tuple[int, str], str] = {}
    for several, prompt, limit in ((False, ONE_HOP, ONE_HOP_TOKENS), (True, MULTI_HOP, MULTI_HOP_TOKENS)):
        places = [(i, wording) for i, question in enumerate(questions) if (question.hops > 1) is several for wording in question.wordings]
        prompts = [turn(lm.tokenizer, prompt.replace("{}", wording), chat) for _, wording in places]
        seeds = [seed_of(wording, seed) for _, wording in places]
        written = lm.generate(prompts, limit, stop_at_newline=False, batch_size=batch_size, temperature=temperature, seeds=seeds)
        texts |= zip(places, written, strict=True)
    asked = iter(
        Asked(question, tuple(Reply(w, texts[i, w], answered(texts[i, w], question.answers)) for w in question.wordings))
        for i, question in enumerate(questions)
    )
    return [MultiHopScore(case.id, tuple(next(asked) for _ in case.questions), temperature, templated) for case in cases]


def seed_of(wording: str, seed: int) -> int:
    """The seed of one reply, 0 to 2³¹ - 1: from what is asked."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, wording]).encode()).digest()[:4], "big") >> 1


def answered(text: str, answers: Iterable[str]) -> bool:
    """Does an answer stand in `text` as whole words, as in `contains`?

    Among the aliases are codes of countries and languages, and many of them are words of every English sentence: IN (India), IT, it, de,
    no. So one to three plain letters count in their own case alone, and two small ones not at all, unless they are the answer itself,
    which comes first.
    """
    first, *aliases = dict.fromkeys(answers)
    counted = [first, *(alias for alias in aliases if not (_is_code(alias) and len(alias) < CODE and alias.islower()))]
    codes = [answer for answer in counted if _is_code(answer)]
    return contains(text, [answer for answer in counted if not _is_code(answer)]) or any(
        re.search(rf"(?<!\w){code}(?!\w)", text) for code in codes
    )


def _is_code(answer: str) -> bool:
    return len(answer) <= CODE and answer.isascii() and answer.isalpha()
