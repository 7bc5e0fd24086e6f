from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.metrics.normalise import contains, exact, normalise

WORDS = st.lists(st.text(string.ascii_letters + string.digits, min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("text", "answer", "is_exact", "is_contained"),
    [
        ("Paris.", "Paris", True, True),
        (' "PARIS"! ', "paris", True, True),
        ("the Paris", "Paris", True, True),
        ("Paris. The", "Paris", False, True),
        ("Paris, the capital", "Paris", False, True),
        ("in Paris", "Paris", False, True),
        ("Parisian", "Paris", False, False),
        ("a comparison", "Paris", False, False),
        ("compris is Paris", "Paris", False, True),
        ("", "Paris", False, False),
        ("Pari s", "Paris", False, False),
        ("U.S.A.", "USA", True, True),
        ("Franche Comté", "Franche-Comté", True, True),
        ("Franche-Comte\u0301", "Franche-Comté", True, True),  # composed and decomposed
        ("Ｐａｒｉｓ", "Paris", True, True),  # full-width forms
        ("STRASSE", "Straße", True, True),
        ("3.14", "3.14.", True, True),
        ("314", "3.14", False, False),
        ("1,000", "1000", True, True),
        ("C", "C#", False, False),
        ("C++", "C++", True, True),
        ("vitamin", "Vitamin A", False, False),
        ("Vitamin A.", "vitamin A", True, True),
        ("Vitamin A helps", "vitamin A", False, True),
        ("a an the end", "end", True, True),
        ("?", "...", False, False),
        ("The", "the", True, True),
        ("New\u00a0York\t City", "new york city", True, True),
        ("它在北京市", "北京", False, True),  # no spaces between words: an answer may stand anywhere
        ("ใน กรุงเทพมหานคร", "กรุงเทพ", False, True),
        ("в Москве", "Москва", False, False),
    ],
)
def test_same_text_or_contained(text: str, answer: str, is_exact: bool, is_contained: bool) -> None:
    assert (exact(text, (answer,)), contains(text, (answer,))) == (is_exact, is_contained)
    assert (exact(text, ("nothing", answer)), contains(text, ("nothing", answer))) == (is_exact, is_contained)


@given(WORDS, st.sampled_from(["{}.", " {} ", '"{}"', "The {}", "{}!?", "({})"]))
def test_dress_does_not_count(words: list[str], dress: str) -> None:
    text = "x" + " ".join(words)
    assert normalise(dress.format(text)) == normalise(text.upper()) == normalise(text)
    assert exact(dress.format(text), [text]) and contains(f"before it {text}, after", [text])


@given(st.text(st.characters(codec="ascii")))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(min_size=1))
def test_no_text_is_lost_altogether_and_exact_implies_contains(text: str) -> None:
    if text.strip() and normalise(text):
        assert exact(text, [text]) and contains(text, [text])
    assert bool(normalise(text)) or not text.strip()
