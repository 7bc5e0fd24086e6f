"""Questions in the open: the paper's prompts to the letter, what counts as answered, how the prompts reach the model, and the table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from errata.facts import EditCase, Fact, Question
from errata.lm import LanguageModel
from errata.metrics import framing, multihop, summarise

FACT = Fact("{} lives in", "Ada", "Rome")
DIRECT = Question(("Where does Ada live?",), ("Rome", "Roma"))
OTHER = Question(("Who is king of Italy?",), ("Umberto",), edited=False)
WHOLE = Question(("Who rules where Ada lives?", "Whose subject is Ada?", "Ada's king?"), ("Umberto", "Umberto II"), 3)
CASE = EditCase("1", (FACT,), questions=(DIRECT, OTHER, WHOLE))
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{m.role}}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"


class Scripted:
    """A model that writes what is laid down for the question in a prompt, and keeps how it was asked."""

    def __init__(self, answers: dict[str, str], tokenizer: Any = None) -> None:
        self.answers, self.tokenizer, self.calls = answers, tokenizer, list[dict[str, Any]]()

    def generate(self, prompts: Sequence[Any], max_new_tokens: int, **options: Any) -> list[str]:
        self.calls.append({"prompts": list(prompts), "tokens": max_new_tokens, **options})
        return [next((said for asked, said in self.answers.items() if asked in prompt), "") for prompt in prompts]


def test_the_prompts_are_those_of_the_paper() -> None:
    model = Scripted({})
    multihop.score(model, CASE)  # type: ignore[arg-type]
    one, several = model.calls
    assert one["prompts"][0] == (
        "You are a helpful AI assistant. Answer questions directly.\n"
        "Always format your response as:\n"
        "Final answer: [concise and direct final answer]\n"
        "Question: Who is the spouse of the head of state in United States of America?\n"
        "Answer: Jill Biden\n"
        "Question: Where does Ada live?\n"
        "Answer:"
    )
    assert several["prompts"][1] == (
        "You are a helpful AI assistant. For each question:\n\n"
        "1. Break it down into simpler subquestions\n"
        "2. Answer each subquestion step by step.\n"
        '3. Use your answers to provide a final answer after "Final answer: "\n\n'
        "Always format your response as:\n"
        "Subquestion: [your subquestion]\n"
        "Generated answer: [your answer]\n"
        "Final answer: [concise and direct final answer]\n\n"
        "Question: Who is the spouse of the head of state in United States of America?\n"
        "Subquestion: Who is the head of state in United States of America?\n"
        "Answer: The head of state in United States of America is Joe Biden.\n"
        "Subquestion: Who is the spouse of Joe Biden?\n"
        "Answer: The spouse of Joe Biden is Jill Biden.\n"
        "Final answer: Jill Biden\n\n"
        "Question: Whose subject is Ada?"
    )
    assert [(call["tokens"], call["temperature"], call["stop_at_newline"]) for call in model.calls] == [(30, 0.1, False), (200, 0.1, False)]
    assert [len(call["prompts"]) for call in model.calls] == [2, 3]


def test_one_right_wording_is_enough_and_every_reply_is_kept() -> None:
    said = {"Where does Ada live?": " in ROMA, I think.", "Who is king": " Nobody.", "Whose subject": " Nobody.\nFinal answer: Umberto."}
    score = multihop.score(Scripted(said), CASE)  # type: ignore[arg-type]
    assert score.metrics == {"one_hop": 1.0, "one_hop_all": 0.5, "multi_hop": 1.0, "hops_3": 1.0}
    record = score.to_dict()
    assert record["temperature"] == 0.1 and record["chat"] is False
    assert [[reply["right"] for reply in asked["replies"]] for asked in record["asked"]] == [[True], [False], [False, True, False]]
    assert record["asked"][2]["replies"][1] == {"wording": "Whose subject is Ada?", "text": said["Whose subject"], "right": True}
    wrong = multihop.score(Scripted({"Where does Ada live?": " In a Romance."}), CASE)  # type: ignore[arg-type]
    assert wrong.metrics == {"one_hop": 0.0, "one_hop_all": 0.0, "multi_hop": 0.0, "hops_3": 0.0}


def test_cases_measured_together_are_the_cases_measured_alone() -> None:
    said = {"Where does Ada live?": " Rome", "Who rules": " Umberto"}
    cases = [CASE, EditCase("2", (FACT,)), replace(CASE, id="3", questions=(OTHER, DIRECT))]
    together = multihop.score_all(Scripted(said), cases)  # type: ignore[arg-type]
    assert together == [multihop.score(Scripted(said), case) for case in cases]  # type: ignore[arg-type]
    assert together[1].metrics == {} and together[2].metrics == {"one_hop": 1.0, "one_hop_all": 0.5}


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("She is from ITALY.", ("Italy", "IT"), True),
        ("It is in it.", ("Italy", "IT", "it"), False),  # codes, and words of any sentence
        ("It is IN.", ("India", "IN", "in"), True),
        ("the US.", ("United States of America", "US"), True),
        ("tell us", ("United States of America", "US"), False),
        ("de", ("de",), True),  # nothing else would count
        ("Lives in the U.S.A.", ("United States of America", "U.S.A."), True),
        ("Romania", ("Rome", "Roma"), False),
        ("答案是東京。", ("東京",), True),
    ],
)
def test_what_counts_as_answered(text: str, answers: tuple[str, ...], right: bool) -> None:
    assert multihop.answered(text, answers) is right


def test_replies_are_seeded_by_what_is_asked(lm: LanguageModel) -> None:
    case = replace(CASE, questions=(Question(("Who is Ada Byron?",), ("London",)), Question(("Who is Bo Ek?",), ("baker",))))
    texts = [asked.replies[0].text for asked in multihop.score(lm, case, seed=1, temperature=2.0).asked]
    turned = replace(case, questions=case.questions[::-1])
    assert texts == [asked.replies[0].text for asked in multihop.score(lm, turned, seed=1, temperature=2.0).asked][::-1]
    assert texts != [asked.replies[0].text for asked in multihop.score(lm, case, seed=2, temperature=2.0).asked]
    greedy = multihop.score(lm, case, seed=1, temperature=0.0)
    assert greedy.asked == multihop.score(lm, case, seed=2, temperature=0.0).asked == multihop.score(lm, case, 1, 1e-6).asked
    assert 0 <= multihop.seed_of("x", 0) < 2**31 and len({multihop.seed_of(w, s) for w in "ab" for s in (0, 1)}) == 4


def test_a_chat_template_is_used_where_there_is_one(lm: LanguageModel) -> None:
    chatty = copy.deepcopy(lm.tokenizer)
    chatty.chat_template = TEMPLATE
    ids = framing.turn(chatty, "Where is Ada?")
    assert not isinstance(ids, str) and list(ids).count(0) == 1 and ids[0] == 0  # one special prefix, the template's
    assert chatty.decode(list(ids)) == "<s>[user]Where is Ada?[answer]"
    assert framing.turn(chatty, "Where is Ada?", "off") == "Where is Ada?" == framing.turn(lm.tokenizer, "Where is Ada?")
    case = replace(CASE, questions=(Question(("Ada?",), ("London",)),))
    with_template = LanguageModel(lm.model, chatty, "tiny")
    assert multihop.score(with_template, case).chat and not multihop.score(with_template, case, chat="off").chat
    prompt = multihop.ONE_HOP.replace("{}", "Ada?")
    expected = lm.generate([f"[user]{prompt}[answer]"], 30, False, temperature=0.1, seeds=[multihop.seed_of("Ada?", 0)])
    assert [reply.text for reply in multihop.score(with_template, case).asked[0].replies] == expected
    with pytest.raises(ValueError, match="has no chat template"):
        multihop.score(lm, case, chat="on")
    with pytest.raises(ValueError, match="unknown chat 'maybe'"):
        multihop.score(lm, case, chat="maybe")


def test_frames() -> None:
    assert framing.framed("Where is {Ada}?", "plain") == "Where is {Ada}?"
    assert framing.framed("Where is Ada?", "qa") == "Question: Where is Ada?\nAnswer:"
    with pytest.raises(ValueError, match="unknown frame 'x'"):
        framing.framed("Where?", "x")


def test_the_table_has_the_papers_columns_and_average() -> None:
    rows = [
        {"reliability": 1.0, "questions": {"one_hop": 0.5, "one_hop_all": 0.75, "multi_hop": 0.0, "hops_2": 0.0, "temperature": 0.1}},
        {"reliability": 1.0, "questions": {"one_hop_all": 0.25, "multi_hop": 1.0, "hops_3": 1.0, "chat": True}},
    ]
    table = summarise(rows)
    asked = {name: table[name] for name in ("one_hop", "one_hop_all", "multi_hop", "hops_2", "hops_3")}
    assert asked == {"one_hop": 50.0, "one_hop_all": 50.0, "multi_hop": 50.0, "hops_2": 0.0, "hops_3": 100.0}
    assert table["average"] == pytest.approx((100 + 50 + 50) / 3) and "chat" not in table and "temperature" not in table
    assert "multi_hop" not in summarise([{"reliability": 1.0}])
