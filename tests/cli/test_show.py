from __future__ import annotations

import json

import pytest

from errata.cli import show


def test_shares_and_percentages_are_not_confused(capsys: pytest.CaptureFixture[str]) -> None:
    show.shares({"seen": 0.985, "two_hop": 1.0, "facts": 1, "layer": 0})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["seen", "98.5", "%"],
        ["two", "hop", "100.0", "%"],
        ["facts", "1"],
        ["layer", "0"],
    ]
    show.percentages({"n": 3, "metrics": {"reliability": 0.5, "locality": None}, "intervals": {"reliability": [0.0, 1.0]}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["reliability", "0.5", "±0.5", "%"], ["cases", "3"]]


def test_text_is_not_markup_and_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show.before_and_after([{"prompt": "[bold]The [/] sign", "before": " one\ntwo", "after": " [red]"}])
    out = capsys.readouterr().out
    assert "[bold]The [/] sign" in out and "one ⏎ two" in out and "[red]" in out


def test_json_keeps_other_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    show.json_out({"prompt": "北京"})
    out = capsys.readouterr().out
    assert "北京" in out and json.loads(out) == {"prompt": "北京"}


def test_progress_without_a_terminal_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress("bench") as report:
        for done in range(1, 101):
            report(done, 100, "lora+ce")
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 11 and err.splitlines()[-1] == "bench: 100 of 100 · lora+ce"
