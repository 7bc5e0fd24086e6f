from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.lm import LanguageModel
from errata.metrics import fluency
from errata.metrics.fluency import entropy, words


def slow(tokens: Sequence[str]) -> float:
    """ROME's published arithmetic, gram by gram: entropies in bits times 2/3 and 4/3, and their mean."""
    weighted = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]
        shares = [grams.count(gram) / len(grams) for gram in dict.fromkeys(grams)]
        weighted.append(weight * sum(-share * math.log(share) / math.log(2) for share in shares))
    return sum(weighted) / 2


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_fluency_is_its_definition(tokens: list[str]) -> None:
    assert fluency.fluency(tokens) == pytest.approx(slow(tokens), abs=1e-12)


def test_strings_made_by_hand() -> None:
    assert fluency.fluency(words("no no no no no no")) == 0.0
    assert fluency.fluency([]) == fluency.fluency(["one"]) == fluency.fluency(["two", "words"]) == 0.0
    assert fluency.fluency(words("a b c")) == pytest.approx(1 / 3)  # two bigrams: 1 bit; one trigram: 0
    assert entropy("ababa", 2) == 1.0 and entropy("ababa", 1) == pytest.approx(0.97095059)
    assert fluency.fluency([str(i) for i in range(18)]) == pytest.approx(math.log2(17) / 3 + 4 * 2 / 3)  # all different
    assert entropy("ab", 5) == 0.0
    with pytest.raises(ValueError, match="at least one token"):
        entropy("ab", 0)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=20))
def test_more_of_the_same_adds_nothing(tokens: list[str]) -> None:
    assert 0 <= fluency.fluency(tokens) <= math.log2(len(tokens))
    assert fluency.fluency(tokens) == pytest.approx(fluency.fluency([token.upper() for token in tokens]))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Paris, the capital.", ["Paris", ",", "the", "capital", "."]),
        ("  \n ", []),
        ("3.14 x2", ["3", ".", "14", "x2"]),
        ("法国 is 2", ["法", "国", "is", "2"]),
        ("a法b", ["a", "法", "b"]),
        ("서울은 한국", ["서울은", "한국"]),
        ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),
        ("প্যারিস রাজধানী", ["প্যারিস", "রাজধানী"]),
        ("Comte\u0301 :)", ["Comte\u0301", ":", ")"]),
    ],
)
def test_words(text: str, cut: list[str]) -> None:
    assert words(text) == cut


@given(st.text())
def test_no_character_is_lost(text: str) -> None:
    assert "".join(words(text)) == "".join(text.split())


def test_what_a_model_writes(lm: LanguageModel) -> None:
    prompts = ["The capital of Italy is", "Ada Byron", "Bo Ek lives in"]
    score = fluency.score_all(lm, prompts, max_new_tokens=12)
    assert list(score.texts) == lm.generate(prompts, 12, stop_at_newline=False)
    assert list(score.values) == pytest.approx([slow(words(text)) for text in score.texts])
    record = json.loads(json.dumps(score.to_dict()))
    assert record["fluency"] == pytest.approx(sum(score.values) / 3, abs=1e-4) and record["transcripts"][1]["text"] == score.texts[1]
    turned = fluency.score_all(lm, prompts[::-1], max_new_tokens=12, temperature=1.0, seed=4)
    assert turned.texts[::-1] == fluency.score_all(lm, prompts, max_new_tokens=12, temperature=1.0, seed=4).texts
    assert fluency.score_all(lm, []).mean is None
    with pytest.raises(ValueError, match="at least one token"):
        fluency.score_all(lm, prompts, max_new_tokens=0)
