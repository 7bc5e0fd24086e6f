"""Does the model still write varied text? Weighted 2- and 3-gram entropy (Meng et al. 2022, ROME: "fluency", GE; EVALUATION §3).

    H_n = − Σ_k f_n(k) log₂ f_n(k)        f_n: relative frequencies of the n-grams of words in one text
    fluency = ⅓ H_2 + ⅔ H_3               in bits

Text that repeats itself scores low. A text of w different words scores about log₂ w, so that only texts of like length compare. The
published code weights with 2/3 and 4/3 and then takes the mean of the two, which is the same; its tables multiply by 100. Here it departs
from that code in three ways: words are cut by `words`, not by NLTK; what the model wrote is counted, without the prompt; and it is
written greedily (or sampled at a temperature), up to 100 new tokens, not drawn from the five likeliest up to 100 with the prompt's.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from errata.lm import LanguageModel, joint
from errata.metrics.multihop import seed_of

WEIGHTS: Mapping[int, float] = {2: 1 / 3, 3: 2 / 3}
"""n -> weight of the entropy of n-grams."""
MAX_NEW_TOKENS = 100
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class FluencyScore:
    """What was written behind each prompt, and the fluency of each in bits."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over the prompts; None without prompts."""
        return fmean(self.values) if self.values else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, to four decimals."""
        rows = zip(self.prompts, self.texts, self.values, strict=True)
        return {
            "fluency": None if self.mean is None else round(self.mean, 4),
            "transcripts": [{"prompt": prompt, "text": text, "fluency": round(value, 4)} for prompt, text, value in rows],
        }


def entropy(tokens: Sequence[Hashable], n: int) -> float:
    """H_n of a text's tokens, in bits; 0 where there is no n-gram, or one alone. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = counts.total()
    return math.fsum(-count / total * math.log2(count / total) for count in counts.values()) + 0.0  # not -0.0


def fluency(tokens: Sequence[Hashable]) -> float:
    """The weighted entropy of a text's tokens, in bits. A text of fewer than three, as of one repeated word, has little or none: 0."""
    return math.fsum(weight * entropy(tokens, n) for n, weight in WEIGHTS.items())


def words(text: str) -> list[str]:
    """`text` cut into words (runs of letters, their marks, and digits) and other characters, one by one; white space is dropped.

    In scripts that write no spaces between words (Thai, Chinese, Japanese …) each letter, with its marks, is a word.
    """
    cut: list[str] = []
    goes_on = False  # whether the last word may grow
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            if goes_on and (kind == "M" or not (_stands_alone(character) or _stands_alone(cut[-1][0]))):
                cut[-1] += character
            else:
                cut.append(character)
        elif not character.isspace():
            cut.append(character)
        goes_on = kind in "LNM"
    return cut


def _stands_alone(letter: str) -> bool:
    return joint(letter, letter) == ""


def score_all(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> FluencyScore:
    """The fluency of what the model, as it is, writes behind the prompts: up to `max_new_tokens` tokens, over line breaks.

    temperature: 0 is greedy; above it each text is sampled, from the seed and its prompt, whatever else is asked.
    A text may end sooner, by the end token, and has then less fluency; so compare a model before and after its edits, not two models.
    Raises ValueError for less than one token or a prompt without any, ModelError for a prompt that is too long.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; leave room for at least one token")
    texts = lm.generate(
        prompts,
        max_new_tokens,
        stop_at_newline=False,
        batch_size=batch_size,
        temperature=temperature,
        seeds=[seed_of(prompt, seed) for prompt in prompts],
    )
    return FluencyScore(tuple(prompts), tuple(texts), tuple(fluency(words(text)) for text in texts))
