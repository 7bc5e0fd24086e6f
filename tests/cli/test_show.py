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


def row(method: str, **metrics: object) -> dict[str, object]:
    known = {"efficacy_top": 90.0, "score": 80.0, "noise": 1234567.0, "k_beta": -0.00123, **metrics}
    return {
        "method": method,
        "objective": "ce",
        "protocol": "sequential:20",
        "measure": "after-sequence",
        "batch": 1,
        "seed": 0,
        "n": 19,
        "failed": 1,
        "metrics": {**known, "checkpoints": [{"edits": edits, **known} for edits in (10, 20)]},
        "intervals": {"efficacy_top": [80.0, 100.0]},
        "seconds_per_edit": 0.125,
    }


def test_a_table_of_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    show.table({"rows": [row("rome", noise=None), row("deltaedit@eta=2")]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["method", "objective", "n", "Eff↑", "S", "noise", "s/edit", "failed"]
    assert lines[1] == ["rome", "ce", "19", "90.0", "±10.0", "80.0", "–", "0.12", "1"]
    assert lines[2][5:] == ["80.0", "1.23e+06", "0.12", "1"]
    assert ["deltaedit@eta=2", "ce", "20", "90.0", "80.0", "1.23e+06", "-0.00123"] in lines


def test_a_table_of_sequences_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    spread = {"mean": {"efficacy_top": 90.0, "noise": 2.0}, "deviation": {"efficacy_top": 1.25, "noise": 0.5}}
    over = {"method": "rome", "objective": "ce", "seeds": [0, 1], "n": 38, "seconds_per_edit": 1.0, **spread}
    over["checkpoints"] = [{"edits": edits, **spread} for edits in (10, 20)]
    show.table({"rows": [row("rome"), row("rome") | {"seed": 1}], "over_seeds": [over]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["method", "objective", "seed"]
    assert ["rome", "ce", "38", "90.0", "±1.2", "–", "2", "±0.5"] in lines
    assert ["rome", "ce", "10", "90.0", "±1.2", "–", "2", "±0.5"] in lines


def test_what_was_measured_beside_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody measured has no column."""
    also = {"perplexity": {"before": 2.0, "after": 2.5}, "ability": {"cola": {"n": 4, "accuracy": {"before": 50.0, "after": 25.0}}}}
    measured = row("rome")
    measured["metrics"]["checkpoints"][-1]["also"] = also  # type: ignore[index]
    show.table({"rows": [measured, row("memit")]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["method", "objective", "perplexity", "ability"] in lines
    assert ["rome", "ce", "2.50", "(+0.50)", "25.0", "(-25.0)"] in lines and ["memit", "ce", "–", "–"] in lines
