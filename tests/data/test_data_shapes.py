"""The same content in every shape that occurs, and broken files whose errors must name file, record and field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata import data
from errata.data import DataError, jsonl
from errata.facts import EditCase, Fact, Probe

BASE = {"subject": "Ada", "prompt": "Ada lives in", "target_new": "Rome", "ground_truth": "Oslo"}
NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} lives in",
        "relation_id": "P551",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Oslo", "id": "Q585"},
        "subject": "Ada",
    },
    "paraphrase_prompts": ["A word. Ada's home is", "Ada dwells in"],
    "neighborhood_prompts": ["Bo lives in", "Cy lives in"],
    "generation_prompts": ["Ada's neighbours are"],
}
MEND = {"subject": "Ada", "src": "Where is Ada?", "alt": "Rome", "answers": ["Oslo", "Kristiania"], "rephrase": "Ada is where?"}


def write(folder: Path, records: Any, name: str = "set.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def one(folder: Path, record: Any) -> EditCase:
    (case,) = data.load(write(folder, [record]))
    return case


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Rome", ("Rome",)),
        (" Rome ", ("Rome",)),
        (["Rome", "Roma"], ("Rome", "Roma")),
        ([["Rome", "Roma"], ["Milan"]], ("Rome", "Roma", "Milan")),
        ([[], ["Rome"], ["", "Rome"]], ("Rome",)),
        (1998, ("1998",)),
    ],
)
def test_answers_in_every_shape(tmp_path: Path, answer: object, expected: tuple[str, ...]) -> None:
    case = one(tmp_path, BASE | {"target_new": answer, "portability": {"Reasoning": [{"prompt": "Her city is", "ground_truth": answer}]}})
    assert case.portability == {"Reasoning": (Probe("Her city is", expected),)}
    assert case.facts == (Fact("Ada lives in", "Ada", expected[0], "Oslo"),)


PROBES = (Probe("Bo lives in", ("Bonn",)), Probe("Cy lives in", ("Cork", "Corcaigh")))
LIST = [{"prompt": "Bo lives in", "ground_truth": "Bonn"}, {"prompt": "Cy lives in", "ground_truth": ["Cork", "Corcaigh"]}]
COLUMNS = {"prompt": ["Bo lives in", "Cy lives in"], "ground_truth": ["Bonn", ["Cork", "Corcaigh"]]}


@pytest.mark.parametrize(
    ("fields", "group"),
    [
        ({"locality": {"Relation_Specificity": LIST}}, "Relation_Specificity"),
        ({"locality": {"Relation_Specificity": LIST, "Forgetfulness": []}}, "Relation_Specificity"),
        ({"locality": {"Relation_Specificity": COLUMNS, "Forgetfulness": None}}, "Relation_Specificity"),
        ({"locality_rs": LIST, "locality_f": []}, "Relation_Specificity"),
        ({"locality_f": LIST, "locality": {}}, "Forgetfulness"),
        ({"locality": LIST}, "locality"),
        ({"locality": COLUMNS}, "locality"),
        ({"locality_prompt": COLUMNS["prompt"], "locality_ground_truth": COLUMNS["ground_truth"]}, "neighbourhood"),
        ({"locality_near_prompt": COLUMNS["prompt"], "locality_near_ground_truth": COLUMNS["ground_truth"]}, "near"),
    ],
)
def test_groups_in_every_shape(tmp_path: Path, fields: dict[str, Any], group: str) -> None:
    assert one(tmp_path, BASE | fields).locality == {group: PROBES}
    assert one(tmp_path, BASE | {"portability": {}, "locality": None}).locality == {}


@pytest.mark.parametrize("name", ["rephrase_prompt", "rephrase", "rephrases"])
@pytest.mark.parametrize(
    ("value", "count"), [("Ada dwells in", 1), (["Ada dwells in"], 1), (["Ada dwells in", "Ada's home:"], 2), ("", 0), (None, 0), ([], 0)]
)
def test_rephrases_in_every_shape(tmp_path: Path, name: str, value: object, count: int) -> None:
    expected = (Probe("Ada dwells in", ("Rome",)), Probe("Ada's home:", ("Rome",)))[:count]
    assert one(tmp_path, BASE | {name: value}).rephrases == expected


def test_a_probe_without_an_answer_is_left_out_and_said(tmp_path: Path) -> None:
    groups = {
        "Forgetfulness": [{"prompt": "Bo won", "ground_truth": [[]]}],
        "Relation_Specificity": [*LIST, {"prompt": "x", "ground_truth": ""}],
    }
    case = one(tmp_path, BASE | {"locality": groups, "ground_truth": ""})
    assert case.locality == {"Relation_Specificity": PROBES} and case.facts[0].ground_truth is None
    assert case.meta == {"unanswered": ["locality.Forgetfulness[0].ground_truth", "locality.Relation_Specificity[2].ground_truth"]}


def test_the_original_counterfact(tmp_path: Path) -> None:
    case = one(tmp_path, NESTED)
    neighbours = (Probe("Bo lives in", ("Oslo",)), Probe("Cy lives in", ("Oslo",)))
    assert case.id == "7" and case.facts == (Fact("{} lives in", "Ada", "Rome", "Oslo"),)
    assert [probe.prompt for probe in case.rephrases] == NESTED["paraphrase_prompts"] and {p.answers for p in case.rephrases} == {("Rome",)}
    assert case.neighbourhood == neighbours and case.locality == {"neighbourhood": neighbours}
    assert case.meta == {"relation": "P551", "generation_prompts": ["Ada's neighbours are"]}


def flat(number: int, subject: str, truth: str, neighbour: str, prompt: str = "{} lives in") -> dict[str, Any]:
    edit = {"case_id": number, "subject": subject, "prompt": prompt.replace("{}", subject), "target_new": "Rome", "ground_truth": truth}
    return edit | {"locality_prompt": neighbour, "locality_ground_truth": truth, "rephrase_prompt": "x"}


def neighbours(folder: Path, records: list[dict[str, Any]]) -> list[list[str]]:
    return [[probe.prompt for probe in case.neighbourhood] for case in data.load(write(folder, records))]


def test_flat_counterfact_pools_neighbours_that_share_template_and_answer(tmp_path: Path) -> None:
    records = [
        flat(0, "Ada", "Oslo", "Bo lives in"),
        flat(1, "Eve", "Bonn", "Cy lives in"),  # another answer
        flat(2, "Fay", "Oslo", "Gus works in", "{} works in"),  # another template
        flat(3, "Hal", "Oslo", "ADA's house is in"),  # speaks of case 0's subject
        flat(4, "Ivy", "Oslo", "Jo lives in"),
        flat(5, "Kim", "Oslo", "Bo lives in"),  # a repetition
    ]
    assert neighbours(tmp_path, records) == [
        ["Bo lives in", "Jo lives in"],
        ["Cy lives in"],
        ["Gus works in"],
        ["ADA's house is in", "Jo lives in", "Bo lives in"],
        ["Jo lives in", "Bo lives in", "ADA's house is in"],
        ["Bo lives in", "ADA's house is in", "Jo lives in"],
    ]
    assert data.load(tmp_path / "set.json")[0].locality == {"neighbourhood": (Probe("Bo lives in", ("Oslo",)),)}  # its own neighbour only
    many = data.load(write(tmp_path, [flat(i, f"S{i}.", "Oslo", f"N{i} lives in") for i in range(30)]))
    assert [probe.prompt for probe in many[25].neighbourhood] == [f"N{i % 30} lives in" for i in range(25, 35)]
    assert data.load(tmp_path / "set.json", limit=3) == many[:3]  # the pool is the whole file's, whatever is taken of it


def test_a_neighbour_may_be_worded_as_the_edit_or_as_the_records_own_neighbour(tmp_path: Path) -> None:
    records = [
        flat(0, "Ada", "Oslo", "In Oslo, there is Bo, who is at home in", "{} lives in"),  # one relation in two wordings …
        flat(1, "Eve", "Oslo", "Cy dwells in", "In Oslo, there is {}, who is at home in"),  # … of which this shares one …
        flat(2, "Fay", "Oslo", "Gus dwells in", "{} dwells in"),  # … and this only what the second has besides
        flat(3, "Hal", "Oslo", "Ivy, who is at home in", "{}, who is at home in"),  # ends like the first, but asks in other words
    ]
    bo, cy, gus, ivy = (record["locality_prompt"] for record in records)
    assert neighbours(tmp_path, records) == [[bo, cy], [cy, gus, bo], [gus, cy], [ivy]]


@pytest.mark.parametrize(("subject", "neighbour", "kept"), [("Egypt", "The Kingdom of egypt", False), ("euro", "Plaza de Europa", True)])
def test_a_neighbour_speaks_of_the_subject_in_whole_words_only(tmp_path: Path, subject: str, neighbour: str, kept: bool) -> None:
    assert neighbours(tmp_path, [flat(0, subject, "Cairo", f"{neighbour} has")]) == [[f"{neighbour} has"] if kept else []]


def test_zsre_of_mend_with_and_without_its_parts(tmp_path: Path) -> None:
    assert one(tmp_path, MEND) == EditCase("0", (Fact("Where is Ada?", "Ada", "Rome", "Oslo"),), (Probe("Ada is where?", ("Rome",)),))
    hop = {"portability": {"Recalled Relation": "(Ada, flag)", "New Question": "Which flag?", "New Answer": "A tricolour"}}
    full = one(tmp_path, MEND | hop | {"loc": "nq question: who is bo", "loc_ans": "a cat"})
    assert full.portability == {"one_hop": (Probe("Which flag?", ("A tricolour",)),)}
    assert full.locality == {"nq_question": (Probe("nq question: who is bo", ("a cat",)),)}


def test_wikibio(tmp_path: Path) -> None:
    case = one(tmp_path, {"text": "About ada b. She was ", "labels": " A writer.", "concept": "ada b", "locality": {}})
    assert case == EditCase("0", (Fact("About ada b. She was", "ada b", "A writer."),))


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_facts_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = [
        '\ufeff{"prompt": "{} lives in", "subject": "Ada", "target": "Rome"}',
        "",
        '{"prompt": "Say", "target": "hi", "id": "greeting"}',
    ]
    path.write_text("\n".join(lines), "utf-8")
    assert data.load(path) == [EditCase("0", (Fact("{} lives in", "Ada", "Rome"),)), EditCase("greeting", (Fact("Say", "", "hi"),))]


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=12).map(str.strip).filter(bool)
probe = st.builds(Probe, text, st.lists(text, min_size=1, max_size=3, unique=True).map(tuple))
groups = st.dictionaries(
    text.filter(lambda name: name not in ("prompt", "New Question")), st.lists(probe, min_size=1, max_size=3).map(tuple), max_size=2
)
fact = st.builds(Fact, text.filter(lambda prompt: "{}" not in prompt), st.just("") | text, text, st.none() | text)
a_case = st.builds(
    EditCase,
    st.just("0"),
    st.lists(fact, min_size=1, max_size=3).map(tuple),
    st.lists(probe, max_size=2).map(tuple),
    groups,
    groups,
    st.lists(probe, max_size=2).map(tuple),
    st.dictionaries(text, st.integers(), max_size=2),
)


@given(st.lists(a_case, min_size=1, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_own_cases_come_back_as_they_were_written(tmp_path: Path, cases: list[EditCase]) -> None:
    cases = [replace(case, id=f"case-{number}") for number, case in enumerate(cases)]
    jsonl.write(tmp_path / "cases.jsonl", cases)
    assert data.load(tmp_path / "cases.jsonl") == cases


FLAT = BASE | {"portability": {"Reasoning": LIST}}
GOOD = {
    "requested_rewrite": NESTED,
    "src": MEND,
    "text": {"text": "a", "labels": "b"},
    "facts": {"facts": [{"prompt": "p", "target": "t"}]},
}
"""A sound record of the same kind, by the field that tells the kind."""


@pytest.mark.parametrize(
    ("record", "field", "problem"),
    [
        ({"prompt": 3, "target_new": "x"}, "prompt", "expected text, got int 3"),
        (BASE | {"prompt": "  "}, "prompt", "is empty"),
        (BASE | {"target_new": ""}, "target_new", "new answer"),
        (BASE | {"target_new": True}, "target_new", "got bool True"),
        (BASE | {"subject": ["Ada"]}, "subject", "expected text, got list"),
        (BASE | {"prompt": "{} lives in", "subject": ""}, "prompt", "slot {} but no subject"),
        (BASE | {"rephrase_prompt": {"prompt": "x"}}, "rephrase_prompt.ground_truth", "is missing"),
        (BASE | {"rephrase_prompt": ["ok", 5]}, "rephrase_prompt[1]", "expected text"),
        (BASE | {"portability": "none"}, "portability", "expected groups of probes"),
        (BASE | {"portability": {"Reasoning": "x"}}, "portability.Reasoning", "expected a list of probes"),
        (BASE | {"portability": {"Reasoning": [LIST[0], "x"]}}, "portability.Reasoning[1]", "expected a probe"),
        (BASE | {"portability": {"Reasoning": [{"prompt": "x"}]}}, "portability.Reasoning[0].ground_truth", "is missing"),
        (BASE | {"locality": {"F": [{"ground_truth": "x"}]}}, "locality.F[0].prompt", "is missing"),
        (BASE | {"locality": {"F": [{"prompt": "x", "ground_truth": {"a": 1}}]}}, "locality.F[0].ground_truth", "expected an answer"),
        (
            BASE | {"locality": {"F": [{"prompt": "x", "ground_truth": ["a", [None, {}]]}]}},
            "locality.F[0].ground_truth[1][1]",
            "expected an",
        ),
        (BASE | {"locality": {"F": {"prompt": ["x", "y"], "ground_truth": ["a"]}}}, "locality.F.ground_truth", "expected 2 answers"),
        (BASE | {"locality_prompt": "x"}, "locality_ground_truth", "is missing beside 'locality_prompt'"),
        (NESTED | {"neighborhood_prompts": "Bo"}, "neighborhood_prompts", "expected a list"),
        (NESTED | {"neighborhood_prompts": ["Bo", ""]}, "neighborhood_prompts[1]", "is empty"),
        (NESTED | {"requested_rewrite": {"prompt": "{} is", "subject": "Ada"}}, "requested_rewrite.target_new", "missing"),
        (NESTED | {"requested_rewrite": "Ada"}, "requested_rewrite", "expected a JSON object, got str"),
        (MEND | {"alt": None}, "alt", "missing"),
        (MEND | {"src": []}, "src", "expected text"),
        (MEND | {"loc": 3, "loc_ans": "x"}, "loc", "expected text"),
        ({"text": "x", "labels": []}, "labels", "missing"),
        ({"text": "x", "labels": "y", "concept": ""}, "concept", "is empty"),
        ({"facts": []}, "facts", "at least one fact"),
        ({"facts": [{"prompt": "a", "target": "b"}, "x"]}, "facts[1]", "expected a JSON object"),
        ({"facts": [{"prompt": "a", "target": "b"}, {"prompt": "a"}]}, "facts[1].target_new", "missing"),
        ({"facts": [{"prompt": "a", "target": "b"}], "neighbourhood": [{"prompt": "x"}]}, "neighbourhood[0].ground_truth", "is missing"),
        ({"facts": [{"prompt": "a", "target": "b"}], "meta": 3}, "meta", "expected a JSON object"),
    ],
)
def test_a_broken_record_is_named_with_its_field(tmp_path: Path, record: dict[str, Any], field: str, problem: str) -> None:
    good = next((ok for key, ok in GOOD.items() if key in record), FLAT)
    path = write(tmp_path, [good, record | {"case_id": "second"}])
    with pytest.raises(DataError) as caught:
        data.load(path)
    assert str(caught.value).startswith(f"{path}, record 1, field {field!r}: ") and problem in str(caught.value)
    assert len(data.load(path, limit=1)) == 1  # what is not asked for is not judged
    lines = tmp_path / "set.jsonl"
    lines.write_text(json.dumps(good) + "\n\n" + json.dumps(record | {"case_id": "second"}), "utf-8")
    with pytest.raises(DataError) as caught:
        data.load(lines)
    assert str(caught.value).startswith(f"{lines}, line 3, field {field!r}: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b'[{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a", "target": "b"}\n{"prompt": ', "line 2: not valid JSON"),
        (b'[{"prompt": "\xff"}]', "not valid JSON"),
        (b'[{"prompt": "a", "target": "b"}, 5]', "record 1: expected a JSON object, got int"),
        (
            b'[{"known_id": 3, "attribute": "x"}]',
            "record 0: not recognised by its fields (known_id, attribute); known formats: errata cases; CounterFact",
        ),
        (b'[{"requested_rewrite": [{}], "questions": []}]', "record 0, field 'requested_rewrite[0].target_new'"),
        (
            b'[{"prompt": "a", "target": "b", "id": 1}, {"prompt": "c", "target": "d", "id": "1"}]',
            "record 1, field 'id': '1' is already the id of ",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load(path)
    assert str(path) in str(caught.value) and problem in str(caught.value)


def test_names_are_found_under_their_usual_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_DATA", raising=False)
    with pytest.raises(DataError, match="ERRATA_DATA"):
        data.load("zsre")
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no zsre_knowedit\.json or ZsRE-test-all\.json"):
        data.load("zsre")
    (tmp_path / "benchmark" / "ZsRE").mkdir(parents=True)
    deep = write(tmp_path / "benchmark" / "ZsRE", [BASE], "ZsRE-test-all.json")
    assert data.find("zsre") == deep and data.load("zsre") == data.load(str(deep))
    preferred = write(tmp_path, [BASE | {"target_new": "Bonn"}], "zsre_knowedit.json")
    assert data.find("zsre") == preferred and data.find("zsre", tmp_path / "benchmark") == deep
    with pytest.raises(DataError, match="no split 'dev'; it has test"):
        data.load("zsre", split="dev")
    with pytest.raises(DataError, match="is a file and has no split"):
        data.load(deep, split="test")
    with pytest.raises(DataError, match="did you mean 'counterfact'"):
        data.load("counterfacts")
    with pytest.raises(DataError, match="no such data file"):
        data.load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="limit is 0"):
        data.load(deep, limit=0)
    assert set(data.names()) >= {"atlas", "zsre", "zsre-mend", "counterfact", "wiki_recent", "wiki_counterfact", "wikibio"}


def test_the_bundled_world_by_name() -> None:
    both, dev, test = (data.load("atlas", split=split) for split in (None, "dev", "test"))
    assert {case.id for case in both} == {case.id for case in dev} | {case.id for case in test} and len(both) == len(dev) + len(test)
    assert data.load("atlas", limit=3, split="dev") == dev[:3]
    with pytest.raises(DataError, match="no split 'train'; it has dev, test"):
        data.load("atlas", split="train")


def test_digest_is_the_files_sha256(tmp_path: Path) -> None:
    path = write(tmp_path, [BASE])
    assert data.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
