"""The wordings in which a fact is optimised and its key is taken: the bare prompt, and behind texts that the model itself wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.stack import Stack
from errata.facts import Fact, FactError
from errata.lm.errors import ModelError
from errata.lm.tokens import Encoded, decode, encode
from errata.methods.base import check_length

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

STARTERS = ("The", "Therefore", "Because", "I", "You")
"""What generated prefixes begin with, in turn (MEMIT's code, arXiv 2210.07229)."""
TOP_K = 5


@dataclass(frozen=True, slots=True)
class Request:
    """One fact as locate-then-edit sees it.

    contexts: prompt and target, the bare prompt first, then behind each prefix; each knows its subject's last token.
    essence: "{subject} is a", whose next token must not change (the KL term), with one more token after it that stands for any answer.
    """

    fact: Fact
    contexts: tuple[Encoded, ...]
    essence: Encoded


def encode_fact(lm: LanguageModel, fact: Fact, prefix: str = "") -> Encoded:
    """The fact's prompt behind a prefix, with target and subject position.

    Raises FactError where the subject does not occur in the prompt, or the tokenizer sees nothing in one of the texts.
    """
    start, end = fact.subject_span
    try:
        return encode(lm.tokenizer, prefix + fact.text, fact.target, (start + len(prefix), end + len(prefix)))
    except ValueError as error:
        raise FactError(str(error)) from error


def request(lm: LanguageModel, fact: Fact, prefixes: tuple[str, ...]) -> Request:
    """A fact in all its wordings. Raises FactError as `encode_fact` does."""
    contexts = tuple(encode_fact(lm, fact, prefix) for prefix in ("", *prefixes))
    if not contexts[0].target_ids:
        raise FactError(f"the target {fact.target!r} has no tokens in {lm.name}; write another answer")
    bare = encode(lm.tokenizer, f"{fact.subject} is a", subject_span=(0, len(fact.subject)))
    made = Request(fact, contexts, Encoded((*bare.ids, bare.ids[-1]), len(bare.ids), bare.subject_last))
    check_length(lm, fact, [*made.contexts, made.essence])
    return made


def prefixes(lm: LanguageModel, count: int, length: int, seed: int = 0) -> tuple[str, ...]:
    """`count` beginnings of text of about `length` tokens, each ended by a full stop and a space.

    Sampled from the *unedited* model's five likeliest tokens at each place, one text at a time (no padding to get wrong), with a
    generator of its own; once for each model. They are put before a prompt as they are, so braces in them do no harm.
    """
    kept: dict[tuple[str, int, int, int], tuple[str, ...]] = vars(lm.model).setdefault("errata_prefixes", {})
    key = (lm.fingerprint, count, length, seed)
    if key not in kept:
        with Stack.of(lm).aside_():
            made = [_sample(lm, STARTERS[i % len(STARTERS)], length, torch.Generator().manual_seed(seed * 1000 + i)) for i in range(count)]
        kept[key] = tuple(text.rstrip(" .\n") + ". " for text in made)
    return kept[key]


@torch.no_grad()
def _sample(lm: LanguageModel, starter: str, length: int, generator: torch.Generator) -> str:
    ids = list(encode(lm.tokenizer, starter).ids)
    ends = [i for i in _ids_of(lm.model.config.get_text_config().eos_token_id, lm.tokenizer.eos_token_id) if i is not None]
    for _ in range(length):
        logits = lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1].float().cpu()
        if not logits.isfinite().all():
            raise ModelError(f"{lm.name} gives no finite probabilities; its weights are broken, load them anew")
        logits[ends] = -torch.inf
        top = logits.topk(TOP_K)
        ids.append(int(top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=generator)]))
    return decode(lm.tokenizer, ids, skip_special=True).strip().replace("\n", " ")


def _ids_of(*values: Any) -> list[int | None]:
    return [i for value in values for i in (value if isinstance(value, list) else [value])]
