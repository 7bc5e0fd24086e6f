"""Requests from JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.corrections import read_requests
from errata.facts import FactError

LINE = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}


def test_what_a_line_may_bring(tmp_path: Path) -> None:
    lines = [LINE, LINE | {"rephrasings": ["France has the capital"], "locality": ["Lyon lies in"], "case_id": 7}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    plain, rich = read_requests(tmp_path / "f.jsonl")
    assert str(plain.facts[0]) == "The capital of {France} is -> Lyon" and plain.rephrases == () and plain.meta["locality"] == ()
    assert [(probe.prompt, probe.answers) for probe in rich.rephrases] == [("France has the capital", ("Lyon",))]
    assert rich.meta["locality"] == ("Lyon lies in",) and plain.id != rich.id


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3"),
        (json.dumps(LINE | {"target": ""}), "target"),
        (json.dumps({"prompt": "The capital of {} is", "subject": "France"}), "target"),
        (json.dumps(LINE | {"rephrasings": "France has the capital"}), "'rephrasings' is no list of prompts"),
        (json.dumps(LINE | {"locality": [1]}), "'locality' is no list of prompts"),
        ("[]", "line 3"),
    ],
)
def test_the_first_broken_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(FactError, match=r"f\.jsonl, line 3") as error:
        read_requests(path)
    assert says in str(error.value)


def test_nothing_is_no_request(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(FactError, match="holds no facts"):
        read_requests(tmp_path / "f.jsonl")
