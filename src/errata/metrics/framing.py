"""How a question is put to a model that writes its answer (EVALUATION §3): as it stands, in a question-answer frame, as a chat's turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FRAMES: Mapping[str, str] = {"plain": "{}", "qa": "Question: {}\nAnswer:"}
"""Name -> text with the place of the question."""

CHATS = ("auto", "on", "off")
"""Whether a prompt becomes a turn of a chat: where the tokenizer has a template; always; never."""


_FRAMED = re.compile(r"^\s*(?:q|question)\s*:|\b(?:a|answer)\s*:(?:\s+the)?\s*$", re.IGNORECASE)
_ASKS = re.compile(r"\?|^\s*(?:who|whom|whose|what|which|where|when|why|how|is|are|was|were)\b", re.IGNORECASE)
_AUXILIARY = re.compile(r"(?<![\w'’-])(?:is|are|was|were)(?![\w'’-])")
_DENIED = re.compile(r"\s*(?:not|never|no longer|n't)\b", re.IGNORECASE)


def framed(question: str, frame: str) -> str:
    """The question in one of FRAMES. Raises ValueError for an unknown one."""
    if frame not in FRAMES:
        raise ValueError(f"unknown frame {frame!r}; there is {', '.join(FRAMES)}")
    return FRAMES[frame].replace("{}", question)


def is_framed(prompt: str) -> bool:
    """Whether a prompt stands in a question-answer frame already ("Q: Where is Lyon? A:")."""
    return _FRAMED.search(prompt) is not None


def negated(prompt: str, subject_span: tuple[int, int] | None = None) -> str | None:
    """The prompt with "not" behind its last is, are, was or were: "Lyon is not located in", "The capital of France is not".

    The last one, because the words that are to be continued hang on it; inside the subject (characters [start, end) of the prompt: "The
    Way We Were") it is no verb. None where that does not deny the statement: a question, a prompt in a frame, one that is denied already,
    or one without these English words.
    """
    if _ASKS.search(prompt) or is_framed(prompt):
        return None
    start, end = subject_span or (0, 0)
    verbs = [found for found in _AUXILIARY.finditer(prompt) if found.end() <= start or found.start() >= end]
    if not verbs or _DENIED.match(prompt, verbs[-1].end()):
        return None
    place = verbs[-1].end()
    return f"{prompt[:place]} not{prompt[place:]}"


def chats(tokenizer: Any, chat: str = "auto") -> bool:
    """Whether prompts become turns of a chat with this tokenizer, under one of CHATS.

    Raises ValueError for an unknown choice, or "on" without a template.
    """
    if chat not in CHATS:
        raise ValueError(f"unknown chat {chat!r}; there is {', '.join(CHATS)}")
    there = bool(getattr(tokenizer, "chat_template", None))
    if chat == "on" and not there:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, or take chat 'auto' or 'off'")
    return there and chat != "off"


def turn(tokenizer: Any, prompt: str, chat: str = "auto") -> str | tuple[int, ...]:
    """What `LanguageModel.generate` is given: the ids of a user's turn and of the start of the answer, or the prompt itself.

    Ids and not text, because the template writes the special prefix itself; encoded again, the text would have it twice.
    """
    if not chats(tokenizer, chat):
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])
