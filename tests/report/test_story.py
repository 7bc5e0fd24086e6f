"""What a report says, from runs that are made up."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev

import pytest

from errata.cli.report import read_run
from errata.report.story import story
from tests.report.made import sequence, single


def test_means_over_cases_with_interval_and_deviation(tmp_path: Path) -> None:
    """Of two seeds the same cases count twice, and the deviation is that of the seeds' means."""
    told = story([read_run(single(tmp_path / "a", {"lora": [(1.0, True), (0.5, False), (0.0, False), (1.0, False)]}, (0, 1)))])
    (line,) = told.lines
    cell = line.cell("reliability")
    assert (line.label, line.n, line.failed) == ("lora", 8, 0) and cell is not None
    assert cell.mean == pytest.approx(62.5) and cell.low < 62.5 < cell.high and cell.deviation == stdev([62.5, 62.5])
    written = line.cell("exact")
    assert written is not None and written.mean == 25 and line.cell("generality") is None
    assert [column.name for column in told.columns] == ["reliability", "exact", "contains", "locality"] and not told.sequence
    assert told.cases[1]["values"] == {"reliability": 0.5, "locality": 0.5, "exact": 0.0, "contains": 0.0}
    assert told.cases[1]["said"] == [{"prompt": "The capital of Land 1 is", "answers": ["Town 1"], "text": " Town 1."}]


def test_a_sequence_is_told_at_its_end_and_at_each_checkpoint(tmp_path: Path) -> None:
    told = story([read_run(sequence(tmp_path / "a", {"memit": [0.0, 0.0, 1.0, 1.0]}))])
    (line,) = told.lines
    end, half = line.cell("efficacy_top"), line.cell("efficacy_top", 2)
    assert told.sequence and list(line.marks) == [2, 4]
    assert end is not None and half is not None and (end.mean, half.mean) == (50, 100)
    assert len(told.cases) == 4 and line.cell("exact") is not None and line.cell("exact", 2) is None


def test_the_better_one_stands_first_and_only_on_the_same_data(tmp_path: Path) -> None:
    cases = {"worse": [(0.0, False)] * 8, "better": [(1.0, True)] * 8}
    runs = [read_run(single(tmp_path / "a", cases)), read_run(single(tmp_path / "b", {"other": [(1.0, True)] * 8}, data_hash="another"))]
    ((one, other, found),) = story(runs).pairs("reliability")
    assert (one.label, other.label) == ("better", "worse") and found.difference == 100 and found.clear


def test_lines_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(single(tmp_path / name, {"lora": [(1.0, True)]})) for name in ("a", "b")]
    assert [line.label for line in story(runs).lines] == ["lora", "lora (b)"]
