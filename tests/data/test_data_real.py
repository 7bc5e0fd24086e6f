"""The real data sets, where they are at hand ($ERRATA_DATA, else ../shared/data beside the repository)."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from errata import data
from errata.facts import EditCase

FOLDER = Path(os.environ.get("ERRATA_DATA") or Path(__file__).resolve().parents[2] / ".." / "shared" / "data")

SETS = [  # name, split, records, has (rephrases, portability, locality, neighbourhood), has an old answer
    ("zsre", None, 1304, (1304, 1304, 1304, 0), 1304),
    ("zsre-mend", None, 1037, (1037, 1037, 1037, 0), 1037),
    ("counterfact", None, 10_000, (10_000, 0, 10_000, 9_997), 10_000),  # three subjects stand in all their neighbours
    ("wiki_recent", None, 570, (0, 103, 415, 0), 0),
    ("wiki_counterfact", None, 1428, (0, 1420, 1427, 0), 1427),
    ("wikibio", "test", 306, (0, 0, 306, 0), 0),
    ("wikibio", "train", 464, (0, 0, 464, 0), 0),
]


def file_of(name: str, split: str | None) -> Path:
    try:
        return data.find(name, FOLDER, split)
    except data.DataError as missing:
        pytest.skip(f"real data not here: {missing}")


@pytest.mark.parametrize(("name", "split", "records", "has", "old"), SETS, ids=[f"{name}-{split or 'all'}" for name, split, *_ in SETS])
def test_every_record_is_read(name: str, split: str | None, records: int, has: tuple[int, ...], old: int) -> None:
    path = file_of(name, split)
    cases = data.load(name, FOLDER, split=split)
    assert len(cases) == records == len(json.loads(path.read_text("utf-8")))
    assert len({case.id for case in cases}) == records
    parts = [[bool(part) for part in (case.rephrases, case.portability, case.locality, case.neighbourhood)] for case in cases]
    assert tuple(sum(column) for column in zip(*parts, strict=True)) == has
    assert sum(case.facts[0].ground_truth is not None for case in cases) == old
    for case in cases:
        (fact,) = case.facts
        start, end = fact.subject_span  # the subject is found in every prompt, so every method can edit every case
        assert fact.text[start:end].casefold() == fact.subject.casefold()
        assert all((*case.portability.values(), *case.locality.values()))  # no empty group
        for text in (fact.prompt, fact.target, *(answer for probe in case.rephrases for answer in probe.answers)):
            assert text == text.strip()
    assert data.load(path) == cases  # the file itself, recognised by its records
    assert data.load(name, FOLDER, limit=7, split=split) == cases[:7]


def test_pooled_neighbourhoods_by_their_definition() -> None:
    records: list[dict[str, Any]] = json.loads(file_of("counterfact", None).read_text("utf-8"))
    edits = [record["prompt"].replace(record["subject"], "{}", 1) for record in records]
    known = [(template, *template.split("{}")) for template in sorted(set(edits), key=lambda template: (-len(template), template))]

    def wordings(edit: str, prompt: str) -> set[str]:
        fits = (t for t, before, after in known if prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(t) - 2)
        return {edit, next(fits, edit)}

    asked = [wordings(edit, record["locality_prompt"]) for edit, record in zip(edits, records, strict=True)]
    assert sum(len(two) == 2 for two in asked) > 5000
    pools: dict[tuple[str, str], set[str]] = defaultdict(set)
    for own, record in zip(asked, records, strict=True):
        for template in own:
            pools[template, record["locality_ground_truth"]].add(record["locality_prompt"])
    spread: dict[str, set[str]] = defaultdict(set)
    sizes = []
    for own, record, case in zip(asked, records, data.load("counterfact", FOLDER), strict=True):
        answer, about = record["ground_truth"], re.compile(rf"(?<!\w){re.escape(record['subject'].casefold())}(?!\w)")
        allowed = {p for template in own for p in pools[template, answer] if not about.search(p.casefold())}
        found = [probe.prompt for probe in case.neighbourhood]
        assert len(found) == len(set(found)) == min(10, len(allowed)) and set(found) <= allowed
        assert {probe.answers for probe in case.neighbourhood} <= {(answer,)}
        assert record["locality_prompt"] not in allowed or found[0] == record["locality_prompt"]
        spread[answer] |= set(found)
        sizes.append(len(found))
    assert [sum(low <= size <= high for size in sizes) for low, high in ((0, 0), (1, 4), (5, 10))] == [3, 3300, 6697]
    served = sum(map(len, spread.values()))
    everything = {(record["locality_ground_truth"], record["locality_prompt"]) for record in records}
    assert served >= 0.999 * len(everything)  # of large pools, too


def test_what_has_no_answer_is_left_out_and_said() -> None:
    file_of("wiki_recent", None)
    unanswered = {case.id: case.meta["unanswered"] for case in data.load("wiki_recent", FOLDER) if "unanswered" in case.meta}
    records = json.loads(file_of("wiki_recent", None).read_text("utf-8"))
    assert sum(map(len, unanswered.values())) == sum(
        not any(probe["ground_truth"])
        for record in records
        for part in (record["portability"], record["locality"])
        for group in part.values()
        for probe in group
    )
    assert all(field.startswith("locality.") and field.endswith(".ground_truth") for fields in unanswered.values() for field in fields)


def first(name: str) -> EditCase:
    file_of(name, None)
    return data.load(name, FOLDER, limit=1)[0]


def test_zsre_mend_keeps_the_natural_question_as_it_is() -> None:
    case = first("zsre-mend")
    (probe,) = case.locality["nq_question"]
    assert probe.prompt.startswith("nq question: ") and len(case.portability["one_hop"]) == 1


def test_wikibio_continues_the_passage() -> None:
    fact = first("wikibio").facts[0]
    assert fact.prompt.startswith(f"This is a Wikipedia passage about {fact.subject}. ") and fact.target.endswith(".")


def test_aliases_of_several_answers_are_all_accepted() -> None:
    file_of("wiki_recent", None)
    probes = [probe for case in data.load("wiki_recent", FOLDER) for group in case.portability.values() for probe in group]
    assert max(len(probe.answers) for probe in probes) > 5 and all(len(set(probe.answers)) == len(probe.answers) for probe in probes)
