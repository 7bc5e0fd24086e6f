"""When two answers are the same text: case, articles, punctuation, Unicode forms and white space do not count."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=\S)")  # before another word: "the Nile" is Nile, but "vitamin A" stays
_MEANINGFUL = frozenset("#%&@")  # punctuation to Unicode, but C# is not C
# A letter or digit of a script that puts spaces between words; in Thai, Chinese or Japanese an answer may begin anywhere.
_SPACED = re.compile(r"[^\W\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")


def normalise(text: str) -> str:
    """`text` with NFKC and case folded, without punctuation, articles and superfluous white space.

    Dashes and slashes become spaces ("Franche-Comté" is two words), other punctuation vanishes ("U.S." is "us"), except the point in a
    number and what tells names apart (C#). Text that is nothing but punctuation stays as it is, so that no answer becomes empty.
    """
    return _ARTICLE.sub("", _words(text))


def _words(text: str) -> str:
    """`normalise` without the removal of articles."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(_kept(folded, i) for i in range(len(folded))).split()) or folded.strip()


def _kept(text: str, i: int) -> str:
    character, category = text[i], unicodedata.category(text[i])
    if category == "Pd" or character == "/":
        return " "
    if character == "." and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit():
        return character
    if character in _MEANINGFUL or not (category.startswith("P") or category in ("Sk", "Cf")):
        return character
    return ""


def exact(text: str, answers: Iterable[str]) -> bool:
    """Is `text` one of the answers and nothing more? "Paris." is "Paris"; "Paris. The" is not."""
    return normalise(text) in {normalise(answer) for answer in answers}


def contains(text: str, answers: Iterable[str]) -> bool:
    """Does one of the answers stand in `text` as whole words? "in Paris. The" contains "Paris"; "comparison" does not.

    With or without articles: in "vitamin A helps" the A only looks like one.
    """
    return any(_stands_in(form(text), form(answer)) for answer in answers for form in (normalise, _words))


def begins(text: str, answers: Iterable[str]) -> bool:
    """Does `text` begin with one of the answers as whole words? "Paris. The" begins with "Paris"; "Parisian" and "in Paris" do not.

    With or without articles, as in `contains`.
    """
    return any(_stands_in(form(text), form(answer), at_start=True) for answer in answers for form in (normalise, _words))


def _stands_in(text: str, answer: str, at_start: bool = False) -> bool:
    for found in re.finditer(f"(?={re.escape(answer)})", text):
        start, end = found.start(), found.start() + len(answer)
        if at_start and start:
            return False
        glued = (text[start - 1 : start], answer[:1]), (answer[-1:], text[end : end + 1])
        if answer and not any(_SPACED.match(left) and _SPACED.match(right) for left, right in glued):
            return True
    return False
