from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from errata.bench.folder import Key, Record, key_of
from errata.bench.plan import Plan
from errata.bench.results import dump, intervals, summarise

PLAN = Plan(model="atlas", data="atlas", methods=("ft-m", "lora"), objectives=("ce", "overtone"))
CASES = [f"case {number}" for number in range(30)]


def records() -> dict[Key, Record]:
    draw = random.Random(0)
    made = {}
    for row in PLAN.rows:
        for case in CASES:
            made[key_of(row, case)] = {
                "method": row.method,
                "objective": row.objective,
                "seed": row.seed,
                "case": case,
                "reliability": draw.random(),
                "generality": draw.random() if draw.random() < 0.7 else None,
                "portability": None,
                "locality": draw.random(),
                "probes": {"locality": {"other": [draw.random() for _ in range(1 + draw.randrange(4))]}},
                "generation": {"exact": float(draw.random() < 0.5), "contains": 1.0, "transcripts": []},
                "seconds": {"edit": draw.random(), "measure": 0.1},
                "peak_memory_mb": draw.random(),
                "settings": {"method": {"name": row.method}, "objective": {"name": row.objective}},
            }
    return made


def test_rows_against_plain_sums() -> None:
    made = records()
    result = summarise(PLAN, {0: CASES}, made, {"torch": "2"})
    assert [(row["method"], row["objective"]) for row in result["rows"]] == [(row.method, row.objective) for row in PLAN.rows]
    assert result["environment"] == {"torch": "2"}
    for row, summary in zip(PLAN.rows, result["rows"], strict=True):
        mine = [made[key_of(row, case)] for case in CASES]
        for name in ("reliability", "generality", "locality"):
            there = [record[name] for record in mine if record[name] is not None]
            assert summary["metrics"][name] == pytest.approx(100 * sum(there) / len(there), abs=1e-5)
        assert summary["metrics"]["generation"] == pytest.approx(100 * sum(r["generation"]["exact"] for r in mine) / 30, abs=1e-5)
        assert summary["metrics"]["portability"] is None
        reported = [summary["metrics"][name] for name in ("reliability", "generality", "locality")]
        assert summary["metrics"]["average"] == pytest.approx(sum(reported) / 3, abs=1e-5), "columns that are not there do not count"
        assert summary["seconds_per_edit"] == pytest.approx(sum(r["seconds"]["edit"] for r in mine) / 30)
        assert summary["peak_memory_mb"] == max(r["peak_memory_mb"] for r in mine)
        assert (summary["n"], summary["failed"], summary["protocol"], summary["seed"]) == (30, 0, "single", 0)


def test_the_order_of_the_records_does_not_matter() -> None:
    made = records()
    shuffled = list(made.items())
    random.Random(1).shuffle(shuffled)
    assert dump(summarise(PLAN, {0: CASES}, dict(shuffled), {})) == dump(summarise(PLAN, {0: CASES}, made, {}))


def test_failed_cases_are_counted_and_in_no_mean() -> None:
    made = records()
    row = PLAN.rows[0]
    before = summarise(PLAN, {0: CASES[1:]}, made, {})["rows"][0]
    made[key_of(row, CASES[0])] = {"method": row.method, "objective": row.objective, "seed": 0, "case": CASES[0], "error": "no subject"}
    after = summarise(PLAN, {0: CASES}, made, {})["rows"][0]
    assert (after["n"], after["failed"]) == (29, 1)
    assert (after["metrics"], after["intervals"]) == (before["metrics"], before["intervals"])


def test_nothing_measured_is_still_json() -> None:
    result = json.loads(dump(summarise(PLAN, {0: CASES}, {}, {})))
    assert [row["n"] for row in result["rows"]] == [0, 0, 0, 0]
    assert set(result["rows"][0]["metrics"].values()) == {None}


def outcome(**shares: float) -> dict[str, Any]:
    return {"probes": {}, **shares}


def test_intervals_agree_with_the_normal_approximation() -> None:
    """For a mean of many cases ±1.96 standard errors; the average of two independent columns is narrower by √2."""
    values = np.random.default_rng(3).random((2000, 2))
    found = intervals([outcome(reliability=a, locality=b) for a, b in values.tolist()])
    widths = {}
    for column, name in enumerate(("reliability", "locality")):
        half = 1.96 * 100 * values[:, column].std() / math.sqrt(2000)
        low, high = found[name]
        assert low is not None and high is not None
        widths[name] = high - low
        assert high - low == pytest.approx(2 * half, rel=0.1)
        assert (low + high) / 2 == pytest.approx(100 * values[:, column].mean(), abs=half / 5)
    low, high = found["average"]
    assert low is not None and high is not None
    assert high - low == pytest.approx(widths["locality"] / math.sqrt(2), rel=0.1)
    assert found["portability"] == [None, None]


def test_a_column_of_one_value_has_no_width_however_rare() -> None:
    found = intervals([*([outcome(reliability=0.5)] * 9), outcome(reliability=0.5, portability=1.0)])
    assert found["reliability"] == [50.0, 50.0] and found["portability"] == [100.0, 100.0]


def test_over_seeds_against_plain_means() -> None:
    plan = replace(PLAN, seeds=(0, 1, 2), methods=("ft-m",), objectives=("ce",))
    values = {0: [0.0, 1.0], 1: [1.0, 1.0], 2: [0.5, 0.0]}
    made = {}
    for row in plan.rows:
        for case, value in zip(CASES, values[row.seed], strict=False):
            record = next(iter(records().values())) | {"seed": row.seed, "case": case, "reliability": value, "generality": None}
            made[key_of(row, case)] = record
    result = summarise(plan, dict.fromkeys(range(3), CASES[:2]), made, {})
    (over,) = result["over_seeds"]
    assert over["seeds"] == [0, 1, 2] and over["n"] == 6 and "generality" not in over["mean"]
    assert over["mean"]["reliability"] == pytest.approx((50 + 100 + 25) / 3, abs=1e-5)
    assert over["deviation"]["reliability"] == pytest.approx(float(np.std([50, 100, 25], ddof=1)), abs=1e-5)
    assert "over_seeds" not in summarise(PLAN, {0: CASES}, records(), {})
