"""Generation beyond the edit's own prompt: frames, negation, leaks."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.data import load
from errata.facts import EditCase, Fact, Probe, Question
from errata.lm import LanguageModel
from errata.metrics import framing, generation
from errata.metrics.normalise import begins, contains

TEMPLATE = "<s>{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}[answer]"

CASE = EditCase(
    "france",
    (Fact("The capital of {} is", "France", "Vienna", "Paris"),),
    rephrases=(
        Probe("France is governed from", ("Vienna", "Wien")),
        Probe("Where does France's government sit?", ("Vienna",)),
        Probe("Q: What is the capital of France? A:", ("Vienna",)),
        Probe("What is the capital of Italy?", ("Rome",)),  # of another fact
    ),
    portability={
        "Subject_Aliasing": (Probe("The capital of Gaul is", ("vienna", "Beč")),),
        "Reasoning": (Probe("They speak", ("German", "x")),),
    },
    locality={
        "same": (
            Probe("The currency of France is the", ("euro",)),
            Probe("The twin of France's capital is", ("Vienna", "Wien")),  # the target belongs there
            Probe("The capital of France is", ("Paris",)),  # the edit's own
            Probe("Frances Byron lives in", ("Rome",)),  # not the subject
            Probe("The river of France that flows in Vienna is the", ("Seine",)),  # names the target
            Probe("The name of the capital of France, which is not Vienna, is", ("Paris",)),
        )
    },
    neighbourhood=(Probe("The capital of Gallia is", ("Paris",)), Probe("The currency of France is the", ("euro",))),
    questions=(Question(("Capital of France?",), ("Vienna", "Vindobona")), Question(("Its river?",), ("Vienna", "no"), hops=2)),
)


class Scripted:
    """Answers from a script; remembers what it was asked, and how."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]) -> None:
        self.tokenizer, self.answers, self.asked = tokenizer, answers, dict[str, tuple[int, bool]]()

    def generate(self, prompts: Sequence[Any], limit: int, stop_at_newline: bool = True, *_: Any, **__: Any) -> list[str]:
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt)) for prompt in prompts]
        self.asked |= dict.fromkeys(texts, (limit, stop_at_newline))
        return [self.answers.get(text, " nothing") for text in texts]


def asked(lm: LanguageModel, case: EditCase, answers: dict[str, str], **options: Any) -> tuple[generation.ExtendedScore, Scripted]:
    model = Scripted(lm.tokenizer, answers)
    (score,) = generation.extended(model, [case], **options)  # type: ignore[arg-type]
    return score, model


def test_every_way_of_asking_and_what_counts(lm: LanguageModel) -> None:
    score, model = asked(
        lm,
        CASE,
        {
            "The capital of France is": " Vienna.",
            "Question: The capital of France is\nAnswer:": " It is Vindobona, in Austria",
            "Q: What is the capital of France? A:": " The Vienna of old",
            "The capital of France is not": " Paris but Vienna",
            "The currency of France is the": " Vienna franc",
            "The name of the capital of France, which is not Vienna, is": " the Vienna",
        },
    )
    assert score.metrics == {
        "plain_exact": 1.0, "plain_contains": 1.0, "plain_alias": 1.0,
        "qa_exact": 0.0, "qa_contains": 0.0, "qa_alias": 1.0,
        "question_exact": 0.0, "question_contains": 0.5, "question_alias": 0.5,
        "chat_exact": None, "chat_contains": None, "chat_alias": None,
        "negation": 0.5, "negation_contains": 1.0, "leak": 1.0, "leak_contains": 1.0,
    }  # fmt: skip
    assert score.ways["plain"][0].aliases == ("Wien", "Beč", "Vindobona")
    assert [one.prompt for one in score.ways["question"]] == [
        "Question: Where does France's government sit?\nAnswer:", "Q: What is the capital of France? A:",
    ]  # fmt: skip
    assert [(one.prompt, one.answers) for one in score.leak] == [("The currency of France is the", ("euro",))]
    assert all(stop for _, stop in model.asked.values())
    record = json.loads(json.dumps(score.to_dict()))
    assert record["id"] == "france" and record["transcripts"]["leak"][0] == {
        "prompt": "The currency of France is the", "target": "Vienna", "answers": ["euro"], "text": " Vienna franc", "at_once": True,
        "contains": True,
    }  # fmt: skip
    other = generation.ExtendedScore("x", {}, (), ()).to_dict()
    summary = generation.summarise_extended([record, {**record, "leak": 0.0}, other])
    assert summary["leak"] == 50.0 and summary["plain_exact"] == 100.0 and summary["chat_exact"] is None and "id" not in summary
    assert generation.summarise_extended([]) == {}


def test_none_where_the_data_do_not_allow_it(lm: LanguageModel) -> None:
    bare = EditCase("bare", (Fact("Question: where is Lyon? Answer:", "", "Rome"),), neighbourhood=CASE.neighbourhood)
    score, _ = asked(lm, bare, {})
    assert set(score.ways) == {"plain"} and score.metrics["plain_exact"] == 0.0
    assert [name for name, value in score.metrics.items() if value is not None] == ["plain_exact", "plain_contains"]
    with pytest.raises(ValueError, match="at least one token"):
        asked(lm, bare, {}, max_new_tokens=0)
    with pytest.raises(ValueError, match="has no chat template"):
        asked(lm, bare, {}, chat="on")


def test_a_turn_of_a_chat_may_have_several_lines(lm: LanguageModel) -> None:
    chatty = copy.deepcopy(lm.tokenizer)
    chatty.chat_template = TEMPLATE
    templated = LanguageModel(lm.model, chatty, "tiny")
    turn = "<s>[user]The capital of France is[answer]"
    score, model = asked(templated, CASE, {turn: "\n\nVienna!\n"})
    assert score.ways["chat"][0].exact and model.asked[turn] == (generation.MAX_NEW_TOKENS, False)
    assert "chat" not in asked(templated, CASE, {}, chat="off")[0].ways
    (real,) = generation.extended(templated, [CASE], max_new_tokens=8)
    assert real.ways["chat"][0].text == lm.generate(["[user]The capital of France is[answer]"], 8, stop_at_newline=False)[0]


def test_several_cases_and_facts_keep_apart(lm: LanguageModel) -> None:
    two = EditCase("two", (Fact("{} lives in", "Ada Byron", "Rome"), Fact("{} lives in", "Bo Ek", "Oslo")))
    cases = [CASE, two, replace(CASE, id="again", facts=(Fact("The capital of {} is", "Norway", "Oslo"),), rephrases=(), questions=())]
    together = generation.extended(lm, cases, max_new_tokens=6)
    assert together == [generation.extended(lm, [case], max_new_tokens=6, batch_size=1)[0] for case in cases]
    assert [reply.prompt for reply in together[1].ways["plain"]] == ["Ada Byron lives in", "Bo Ek lives in"]
    assert [reply.target for reply in together[1].ways["plain"]] == ["Rome", "Oslo"] and not together[1].negation
    numbers: list[list[int]] = []

    def within(rows: list[int]) -> Any:
        numbers.append(rows)
        return nullcontext()

    assert generation.extended(lm, cases, max_new_tokens=6, within=within) == together
    assert sorted({row for rows in numbers for row in rows}) == [0, 1, 2]
    assert all(reply.text == generation.score(lm, case, 6).transcripts[i].text for case, s in zip(cases, together, strict=True)
               for i, reply in enumerate(s.ways["plain"]))  # fmt: skip


def test_atlas_has_probes_of_every_kind() -> None:
    cases = load("atlas", limit=60)
    kinds = [{one.kind for one in generation._asked(0, case, False)} for case in cases]
    assert all({"plain", "qa", "question", "leak"} <= some for some in kinds)
    assert 20 <= sum("negation" in some for some in kinds) < 60


@pytest.mark.parametrize(
    ("prompt", "subject", "denied"),
    [
        ("The capital of France is", "France", "The capital of France is not"),
        ("The capital of France is the", "France", "The capital of France is not the"),
        ("Vinson Massif is located in the continent of", "Vinson Massif", "Vinson Massif is not located in the continent of"),
        ("The headquarters of Grovax are in", "Grovax", "The headquarters of Grovax are not in"),
        ("The country that X is associated with is", "X", "The country that X is associated with is not"),
        ("X, who was born in", "X", "X, who was not born in"),
        ("The director of The Way We Were is", "The Way We Were", "The director of The Way We Were is not"),
        ("The Way We were came out in", "The Way We were", None),
        ("This Island plays", "This Island", None),
        ("France has its capital in", "France", None),
        ("The capital of France is not", "France", None),
        ("X is no longer in", "X", None),
        ("Where is France located?", "France", None),
        ("Which city is the capital of France", "France", None),
        ("Q: The capital of France is A:", "France", None),
    ],
)
def test_denying_a_statement(prompt: str, subject: str, denied: str | None) -> None:
    start = prompt.index(subject)
    assert framing.negated(prompt, (start, start + len(subject))) == denied


@given(st.text("ab is not was", max_size=20))
def test_denying_adds_a_word_and_does_so_once(prompt: str) -> None:
    denied = framing.negated(prompt)
    if denied is not None:
        assert denied.replace(" not", "", 1) == prompt.replace(" not", "", 1) or denied.count("not") == prompt.count("not") + 1
        assert framing.negated(denied) is None


def test_frames_that_are_there_already() -> None:
    assert all(framing.is_framed(text) for text in ("Q: Where is X? A:", "question: X", "Where? Answer: the", "Q: X A: the"))
    assert not any(framing.is_framed(text) for text in ("The capital of France is", "Where is X?", "Vitamin A: what is it"))


@pytest.mark.parametrize(
    ("text", "answer", "at_once"),
    [
        ("Paris. The", "Paris", True), (" the Paris of old", "Paris", True), ("Parisian", "Paris", False), ("in Paris", "Paris", False),
        ("", "Paris", False), ("A-Team won", "A Team", True), ("北京市", "北京", True), ("Paris", "Par", False),
    ],
)  # fmt: skip
def test_begins(text: str, answer: str, at_once: bool) -> None:
    assert begins(text, ["nothing", answer]) is at_once


@given(st.text("ab Pari.,", max_size=12), st.text("abPari", min_size=1, max_size=3))
def test_what_begins_with_an_answer_contains_it(text: str, answer: str) -> None:
    assert not begins(text, [answer]) or contains(text, [answer])
    assert begins(f"{answer}. {text}", [answer])
