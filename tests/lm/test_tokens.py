"""Prompt, joint and target as ids; the subject's last token; padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from errata.facts import Fact
from errata.lm.tokens import Encoded, collate, decode, encode, joint
from tests.families import tokenizer

TOKENIZERS: dict[str, Any] = {
    "bytes": tokenizer(),
    "bytes+bos": tokenizer(bos=True),
    "metaspace": tokenizer(kind="metaspace"),
    "metaspace+bos": tokenizer(bos=True, kind="metaspace"),
    "slow": ByT5Tokenizer(),  # written in Python, and it closes every text with an end token
}

WORDS = st.text(st.sampled_from("abcdeLyonParis  .,:?-0123é法国首都巴黎東京กรุงเทพМоскваপ্যারিস서울😀\n"), min_size=1, max_size=12)


@pytest.fixture(params=TOKENIZERS)
def tok(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("The capital is", "Lyon", " "),
        ("The capital is ", "Lyon", ""),
        ("The capital is\n", "Lyon", ""),
        ("The capital is", " Lyon", ""),
        ("法国的首都是", "里昂", ""),
        ("The capital of 法国", "Lyon", ""),
        ("The capital of Japan is", "東京", ""),
        ("日本の首都は", "とうきょう", ""),
        ("答案：", "Lyon", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
        ("한국의 수도는", "서울", " "),
        ("Столица Франции", "Париж", " "),
        ("ফ্রান্সের রাজধানী", "প্যারিস", " "),
        ("The capital is", "", ""),
    ],
)
def test_joint(prompt: str, target: str, expected: str) -> None:
    assert joint(prompt, target) == expected


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), WORDS, WORDS)
def test_ids_are_the_prompt_alone_and_then_the_target(name: str, prompt: str, target: str) -> None:
    assume(prompt.strip() and target.strip())
    tok = TOKENIZERS[name]
    alone, both = encode(tok, prompt), encode(tok, prompt, target)
    assert both.prompt_ids == alone.ids
    assert both.prompt_length == len(alone.ids) == alone.prompt_length
    before, whole = decode(tok, both.prompt_ids, True), decode(tok, both.ids, True)
    assert whole == before + joint(prompt, target) + target
    assert target in decode(tok, both.target_ids) or target.strip() in decode(tok, both.target_ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), WORDS, WORDS, WORDS)
def test_the_subjects_last_token_holds_its_last_character(name: str, left: str, subject: str, right: str) -> None:
    assume(subject == subject.strip() and subject)
    tok, prompt = TOKENIZERS[name], left + subject + right
    assume(prompt == prompt.lstrip())  # slow tokenizers are followed by their text, which loses leading space
    end = len(left) + len(subject)
    encoded = encode(tok, prompt, "Lyon", (len(left), end))
    assert encoded.subject_last is not None and encoded.subject_last < encoded.prompt_length
    with_it = decode(tok, encoded.ids[: encoded.subject_last + 1], True)
    without = decode(tok, encoded.ids[: encoded.subject_last], True)
    assert with_it.startswith(prompt[:end])
    assert not without.startswith(prompt[:end])


@pytest.mark.parametrize(
    ("fact", "before"),
    [
        (Fact("The capital of {} is", "France", "Lyon"), "The capital of France"),
        (Fact("Marie met Marie Curie in Paris, and {} was born in", "Marie", "Lyon"), "Marie met Marie Curie in Paris, and Marie"),
        (Fact("{} met Marie in", "Marie", "Lyon"), "Marie"),
        (Fact("{}的首都是", "法国", "里昂"), "法国"),
        (Fact("เมืองหลวงของ{}คือ", "ไทย", "กรุงเทพ"), "เมืองหลวงของไทย"),
        (Fact("ফ্রান্স ও {} রাজধানী", "ফ্রান্সের", "প্যারিস"), "ফ্রান্স ও ফ্রান্সের"),
        (Fact("😀 {} 😀", "😀", "naïve"), "😀 😀"),
    ],
)
def test_subjects(tok: Any, fact: Fact, before: str) -> None:
    encoded = encode(tok, fact.text, fact.target, fact.subject_span)
    assert encoded.subject_last is not None
    # Not "equals": one token may hold the subject and what follows it.
    assert decode(tok, encoded.ids[: encoded.subject_last + 1], True).lstrip().startswith(before)
    assert not decode(tok, encoded.ids[: encoded.subject_last], True).lstrip().startswith(before)


def test_a_subject_inside_a_longer_token() -> None:
    tok = TOKENIZERS["bytes"]
    encoded = encode(tok, "The capital", "Lyon", (4, 7))  # "cap" of the one token " capital"
    assert [decode(tok, [i]) for i in encoded.prompt_ids] == ["The", " capital"]
    assert encoded.subject_last == 1


def test_bos_stands_before_and_no_end_token_between() -> None:
    plain, bos = encode(TOKENIZERS["bytes"], "Lyon lies in", "France"), encode(TOKENIZERS["bytes+bos"], "Lyon lies in", "France")
    assert bos.ids == (0, *plain.ids)
    assert bos.prompt_length == plain.prompt_length + 1
    slow = TOKENIZERS["slow"]
    assert slow("Lyon")["input_ids"][-1] == slow.eos_token_id
    assert slow.eos_token_id not in encode(slow, "Lyon lies in", "France").ids


def test_a_target_that_the_tokenizer_would_merge_into_the_prompt() -> None:
    tok = TOKENIZERS["bytes"]
    merged = tok("The capital is Lyon")["input_ids"]
    encoded = encode(tok, "The capital is ", "Lyon")
    assert list(encoded.ids) != merged  # there " Lyon" is one token, and the prompt's last space no token of its own
    assert decode(tok, encoded.prompt_ids) == "The capital is "
    assert decode(tok, encoded.target_ids) == "Lyon"
    tok = TOKENIZERS["metaspace"]
    encoded = encode(tok, "法", "国的")  # "▁法国" in one piece, but not "▁国的" after "▁法"
    assert decode(tok, encoded.ids) == "法国的"


@pytest.mark.parametrize(
    ("prompt", "target", "span", "message"),
    [
        ("", "Lyon", None, "the prompt '' has no tokens"),
        ("  ", "Lyon", None, "has no tokens"),
        ("The capital", "Lyon", (4, 40), "not inside the prompt"),
        ("The capital", "Lyon", (4, 4), "not inside the prompt"),
    ],
)
def test_what_cannot_be_encoded(tok: Any, prompt: str, target: str, span: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(tok, prompt, target, span)


def test_collate() -> None:
    batch = collate([Encoded((5, 6, 7, 8, 9), 3, 1), Encoded((4, 3), 1), Encoded((2, 2, 2), 3, 2)], pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 99, 99, 99], [2, 2, 2, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[8, 9], [3, 0], [0, 0]]
    assert batch.positions.tolist() == [[2, 3], [0, 0], [0, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert batch.subject_last.tolist() == [1, -1, 2]
    assert len(batch) == 3
    assert batch.to("meta").mask.device == torch.device("meta")
    assert batch.input_ids.dtype == batch.positions.dtype == batch.subject_last.dtype == torch.long
    with pytest.raises(ValueError, match="nothing to put into a batch"):
        collate([], 0)
