"""OVERTONE's tables, from results that are made up, so that every number is known."""

from __future__ import annotations

from statistics import stdev
from typing import Any

import pytest

from errata.report import DrawingError
from errata.report.overfitting import together
from errata.report.overtone import sheets


def row(method: str, objective: str, rel: float, seed: int = 0, protocol: str = "single", failed: int = 0, **more: Any) -> dict[str, Any]:
    metrics = {"reliability": rel, "generality": None, "average": rel - 1, "generation": rel / 2}
    base = {"method": method, "objective": objective, "seed": seed, "protocol": protocol, "n": 10 - failed, "failed": failed}
    return {**base, "metrics": metrics, "intervals": {"reliability": [rel - 3, rel + 1]}, **more}


def results(*rows: dict[str, Any], data: str = "data/zsre.json") -> dict[str, Any]:
    return {"rows": list(rows), "environment": {"model": "some/where/Llama-2", "data": data}}


def test_a_method_then_with_overtone_then_the_paired_difference() -> None:
    rels = {"ce": (80.0, 90.0, 85.0), "overtone": (82.0, 91.0, 90.0)}
    rows = [row("lora", name, rel, seed) for seed in range(3) for name, own in rels.items() for rel in [own[seed]]]
    (sheet,) = sheets(results(*[row("rome", "ce", 60.0, seed) for seed in range(3)], *rows))
    assert sheet.title == "Llama-2 on zsre, T = 1, 10 edits a seed, mean of 3 seeds ± standard deviation; without a name: ce"
    assert sheet.headings == ("method", "Rel.", "Avg.", "EM"), "what no row has is no column"
    assert [line[0] for line in sheet.rows] == ["rome", "lora", "+ overtone", "difference"]
    assert sheet.rows[1][1] == f"85.00 ±{stdev(rels['ce']):.2f}" and sheet.rows[1][2].startswith("84.00")
    assert sheet.rows[3][1] == f"+2.67 ±{stdev((2.0, 1.0, 5.0)):.2f}"
    assert sheet.best == {(2, 1), (2, 2), (2, 3)}, "a difference is never the best"


def test_of_one_seed_the_interval_and_the_failed() -> None:
    (sheet,) = sheets(results(row("lora", "ce", 80.0, failed=2), row("lora", "overtone", 70.0), row("retrieval", "none", 90.0)))
    assert "± half a 95 % interval" in sheet.title and "10 edits" in sheet.title and sheet.headings[-1] == "failed"
    assert [line[0] for line in sheet.rows] == ["lora", "+ overtone", "difference", "retrieval"]
    assert sheet.rows[0][1:] == ("80.00 ±2.00", "79.00", "40.00", "2") and sheet.rows[2][1:] == ("-10.00", "-10.00", "-5.00", "")


def test_a_labelled_row_with_overtone_alone_names_it() -> None:
    rows = (row("lora", "ce", 80.0), row("lora", "overtone", 85.0), row("lora@no-clip", "overtone", 81.0))
    (sheet,) = sheets(results(*rows))
    assert [line[0] for line in sheet.rows] == ["lora", "+ overtone", "difference", "lora@no-clip + overtone"]


def test_several_runs_are_a_table_for_each_data_set_and_length() -> None:
    block = {"measure": "after-sequence", "blocks": 1, "last_block": 7}
    runs = [
        results(row("lora", "ce", 80.0)),
        results(row("lora", "ce", 50.0, protocol="continual:10", **block)),
        results(row("lora", "ce", 70.0), data="wikibio"),
    ]
    titles = [sheet.title.partition(", ±")[0] for sheet in sheets(together(runs))]
    assert titles == [
        "Llama-2 on zsre, T = 1, 10 edits", "Llama-2 on zsre, T = 10 (the last row 7), 10 edits", "Llama-2 on wikibio, T = 1, 10 edits",
    ]  # fmt: skip


def test_a_sequence_is_none_of_them() -> None:
    with pytest.raises(DrawingError, match="no single or continual edits"):
        sheets(results(row("lora", "ce", 80.0, protocol="sequential:10")))
