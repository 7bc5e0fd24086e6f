"""MQuAKE's records: what becomes of their fields, and broken ones, whose errors name file, record and field."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from errata import data
from errata.data import DataError, jsonl
from errata.facts import EditCase, Fact, FactError, Question

FOLDER = Path(os.environ.get("ERRATA_DATA") or Path(__file__).resolve().parents[2] / ".." / "shared" / "data")

REWRITE = {"prompt": "{} lives in", "relation_id": "P551", "target_new": {"str": "Rome"}, "target_true": {"str": "Oslo"}}
RECORD: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": [
        REWRITE | {"subject": "Ada", "question": "Where does Ada live?"},
        REWRITE | {"subject": "Rome", "prompt": "{} lies in", "target_new": {"str": "Norway"}, "question": "In which land is Rome?"},
    ],
    "questions": ["Who is the king where Ada lives?", "Whose subject is Ada?"],
    "new_answer": "Harald",
    "new_answer_alias": ["Harald V", "Harald"],
    "new_single_hops": [
        {"question": "Where does Ada live?", "cloze": "Ada lives in", "answer": "Rome", "answer_alias": ["Roma"]},
        {"question": "Which land has Rome?", "cloze": "Rome lies in", "answer": "Norway", "answer_alias": []},
        {"question": "Who is king of Norway?", "cloze": "Norway's king is", "answer": "Harald", "answer_alias": ["Harald V"]},
    ],
}


def load(folder: Path, record: Any) -> EditCase:
    path = folder / "set.json"
    path.write_text(json.dumps([record]), "utf-8")
    (case,) = data.load(path)
    return case


def test_the_edits_of_a_case_stay_together_and_every_hop_is_asked(tmp_path: Path) -> None:
    case = load(tmp_path, RECORD)
    assert case.id == "7" and case.meta == {"relations": ["P551", "P551"]}
    assert case.facts == (Fact("{} lives in", "Ada", "Rome", "Oslo"), Fact("{} lies in", "Rome", "Norway", "Oslo"))
    assert case.questions == (
        Question(("Where does Ada live?",), ("Rome", "Roma"), 1, True),  # the edit's own question
        Question(("Which land has Rome?",), ("Norway",), 1, True),  # the edit's own words
        Question(("Who is king of Norway?",), ("Harald", "Harald V"), 1, False),  # nothing was edited about him
        Question(("Who is the king where Ada lives?", "Whose subject is Ada?"), ("Harald", "Harald V"), 3, True),
    )
    assert not (case.rephrases or case.portability or case.locality or case.neighbourhood)


def test_questions_are_written_and_read_back_and_are_not_there_without(tmp_path: Path) -> None:
    case = load(tmp_path, RECORD)
    jsonl.write(tmp_path / "own.jsonl", [case])
    assert data.load(tmp_path / "own.jsonl") == [case] == [EditCase.from_dict(json.loads(json.dumps(case.to_dict())))]
    assert "questions" not in EditCase("1", case.facts).to_dict()  # so that the hash of other data is what it was
    old = {"id": "1", "facts": [fact.to_dict() for fact in case.facts]}
    assert EditCase.from_dict(old) == EditCase("1", case.facts) == load(tmp_path, old)


BROKEN = [
    ("requested_rewrite", [], "requested_rewrite"),
    ("requested_rewrite", ["Rome"], "requested_rewrite[0]"),
    ("requested_rewrite.1.target_new", None, "requested_rewrite[1].target_new"),
    ("requested_rewrite.1.prompt", "", "requested_rewrite[1].prompt"),
    ("questions", None, "questions"),
    ("questions", "Who?", "questions"),
    ("questions.1", 5, "questions[1]"),
    ("new_answer", None, "new_answer"),
    ("new_answer_alias", [{}], "new_answer_alias[0]"),
    ("new_single_hops", None, "new_single_hops"),
    ("new_single_hops.0", [], "new_single_hops[0]"),
    ("new_single_hops.2.question", " ", "new_single_hops[2].question"),
    ("new_single_hops.2.answer", [], "new_single_hops[2].answer"),
]


@pytest.mark.parametrize(("path", "value", "field"), BROKEN, ids=[f"{path}={value}" for path, value, _ in BROKEN])
def test_a_broken_record_is_named(tmp_path: Path, path: str, value: Any, field: str) -> None:
    record: Any = copy.deepcopy(RECORD)
    *way, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    place = record
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises(DataError) as caught:
        load(tmp_path, record)
    assert f"set.json, record 0, field {field!r}" in str(caught.value)


OWN = {"wordings": ["Who?"], "answers": ["Ada"]}


@pytest.mark.parametrize("item", ["Who?", OWN | {"answers": []}, OWN | {"wordings": " "}, OWN | {"hops": "two"}, OWN | {"hops": 0}])
def test_a_broken_question_of_ones_own_is_named(tmp_path: Path, item: Any) -> None:
    fact = {"prompt": "{} lives in", "subject": "Ada", "target": "Rome"}
    assert load(tmp_path, {"facts": [fact], "questions": [OWN]}).questions == (Question(("Who?",), ("Ada",)),)
    with pytest.raises(DataError, match=r"record 0, field 'questions\[1\]'"):
        load(tmp_path, {"facts": [fact], "questions": [OWN, item]})


def test_a_question_needs_wordings_answers_and_hops() -> None:
    for wrong in (((), ("a",), 1), (("q",), ("a", " "), 1), (("q",), ("a",), 0)):
        with pytest.raises(FactError, match="question needs at least one"):
            Question(*wrong)


@pytest.mark.parametrize(("split", "records", "edits", "hops"), [("test", 354, 436, 1000), ("hard", 429, 1716, 1716)])
def test_every_real_record_is_read(split: str, records: int, edits: int, hops: int) -> None:
    try:
        path = data.find("mquake", FOLDER, split)
    except DataError as missing:
        pytest.skip(f"real data not here: {missing}")
    if path.name not in ("mquake_cf_354.json", "mquake_hard.json"):
        pytest.skip(f"another edition: {path.name}")
    cases = data.load("mquake", FOLDER, split=split)
    assert len(cases) == records == len({case.id for case in cases}) and data.load(path) == cases
    assert sum(len(case.facts) for case in cases) == edits
    for case in cases:
        *single, whole = case.questions
        assert all(question.hops == 1 and len(question.wordings) == 1 for question in single)
        assert whole.hops == len(single) >= 2 and len(whole.wordings) == 3
        assert sum(question.edited for question in single) == len(case.facts)  # each edit has a hop of its own
        assert all(fact.text[slice(*fact.subject_span)] == fact.subject for fact in case.facts)
    assert sum(len(case.questions) - 1 for case in cases) == hops
