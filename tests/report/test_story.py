"""What a report says, from runs that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest

from errata.cli.report import names, read_run
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
    cases = {"worse": [(0.0, False)] * 12, "better": [(1.0, True)] * 12}
    runs = [read_run(single(tmp_path / "a", cases)), read_run(single(tmp_path / "b", {"other": [(1.0, True)] * 12}, data_hash="another"))]
    ((one, other, found),) = story(runs).pairs("reliability")
    assert (one.label, other.label) == ("better (a)", "worse (a)") and found.difference == 100 and found.clear


def test_lines_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(single(tmp_path / name, {"lora": [(1.0, True)]})) for name in ("a", "b")]
    assert [line.label for line in story(runs).lines] == ["lora (a)", "lora (b)"]


def test_nothing_is_compared_under_different_conditions(tmp_path: Path) -> None:
    """Another model, protocol or time of measurement; then each line says which run it is of."""
    whole = read_run(sequence(tmp_path / "S", {"memit": [1.0] * 12}))
    same = read_run(sequence(tmp_path / "T", {"rome": [0.0] * 12}))
    assert [line.label for line in story([whole, same]).lines] == ["memit", "rome"] and story([whole, same]).pairs("efficacy_top")
    model = replace(same, results={**same.results, "environment": {**same.results["environment"], "model": "another"}})
    measure = replace(same, plan={**same.plan, "measure": "after-each"})
    protocol = replace(same, plan={**same.plan, "protocol": "sequential:24"})
    for other in (model, measure, protocol):
        told = story([whole, other])
        assert told.pairs("efficacy_top") == [] and [line.label for line in told.lines] == ["memit (S)", "rome (T)"]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    assert names([tmp_path / "a/run", tmp_path / "b/other"]) == ["run", "other"]
    assert names([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "b/other"]) == ["a/run", "b/run", "b/other"]


def test_cases_that_all_agree_have_an_interval(tmp_path: Path) -> None:
    (line,) = story([read_run(single(tmp_path / "a", {"lora": [(1.0, True)] * 12}))]).lines
    cell = line.cell("exact")
    assert cell is not None and cell.mean == cell.high == 100 and 70 < cell.low < 80
