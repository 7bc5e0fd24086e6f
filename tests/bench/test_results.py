from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from errata.bench.folder import Key, Record, key_of
from errata.bench.plan import Plan
from errata.bench.results import dump, means, summarise

PLAN = Plan(model="atlas", data="atlas", methods=("ft-m", "lora"), objectives=("ce", "overtone"))
CASES = [f"case {number}" for number in range(30)]


def records() -> dict[Key, Record]:
    draw = random.Random(0)
    made = {}
    for row in PLAN.rows:
        for case in CASES:
            shares = {"reliability": draw.random(), "generality": draw.random(), "portability": None, "locality": draw.random()}
            made[key_of(row, case)] = {
                "method": row.method,
                "objective": row.objective,
                "seed": row.seed,
                "case": case,
                "metrics": {**shares, "generation": float(draw.random() < 0.5)},
                "probes": {"locality": [draw.random() for _ in range(draw.randrange(4))]},
                "seconds": {"edit": draw.random(), "measure": 0.1},
                "peak_memory_mb": draw.random(),
                "settings": {"method": {"name": row.method}, "objective": {"name": row.objective}},
            }
    return made


def test_rows_against_plain_sums() -> None:
    made = records()
    result = summarise(PLAN, CASES, made, {"torch": "2"})
    assert [(row["method"], row["objective"]) for row in result["rows"]] == [(row.method, row.objective) for row in PLAN.rows]
    for row, summary in zip(PLAN.rows, result["rows"], strict=True):
        mine = [made[key_of(row, case)] for case in CASES]
        for name in ("reliability", "generality", "locality", "generation"):
            assert summary["metrics"][name] == pytest.approx(100 * sum(r["metrics"][name] for r in mine) / 30, abs=1e-5)
        assert summary["metrics"]["portability"] is None
        reported = [summary["metrics"][name] for name in ("reliability", "generality", "locality")]
        assert summary["metrics"]["average"] == pytest.approx(sum(reported) / 3, abs=1e-5), "columns that are not there do not count"
        flat = [share for r in mine for share in r["probes"]["locality"]]
        assert summary["flat"]["locality"] == pytest.approx(100 * sum(flat) / len(flat), abs=1e-5)
        assert summary["seconds_per_edit"] == pytest.approx(sum(r["seconds"]["edit"] for r in mine) / 30)
        assert summary["peak_memory_mb"] == max(r["peak_memory_mb"] for r in mine)
        assert (summary["n"], summary["failed"], summary["protocol"]) == (30, 0, "single")


def test_the_order_of_the_records_does_not_matter() -> None:
    made = records()
    shuffled = list(made.items())
    random.Random(1).shuffle(shuffled)
    assert dump(summarise(PLAN, CASES, dict(shuffled), {})) == dump(summarise(PLAN, CASES, made, {}))


def test_failed_cases_are_counted_and_in_no_mean() -> None:
    made = records()
    row = PLAN.rows[0]
    before = summarise(PLAN, CASES[1:], made, {})["rows"][0]
    made[key_of(row, CASES[0])] = {"method": row.method, "objective": row.objective, "seed": 0, "case": CASES[0], "error": "no subject"}
    after = summarise(PLAN, CASES, made, {})["rows"][0]
    assert (after["n"], after["failed"]) == (29, 1)
    assert after["metrics"] == before["metrics"]


def test_nothing_measured_is_still_json() -> None:
    result = json.loads(dump(summarise(PLAN, CASES, {}, {})))
    assert [row["n"] for row in result["rows"]] == [0, 0, 0, 0]
    assert result["rows"][0]["metrics"] == {"average": None}


def test_interval_is_that_of_the_normal_approximation() -> None:
    """For a mean of many cases the bootstrap must agree with ±1.96 standard errors, and the joint one of Avg. be narrower."""
    draw = np.random.default_rng(3)
    values = draw.random((2000, 2))
    outcomes = [{"metrics": {"reliability": a, "locality": b}, "probes": {}} for a, b in values.tolist()]
    result = means(outcomes)
    for column, name in enumerate(("reliability", "locality")):
        half = 1.96 * 100 * values[:, column].std() / math.sqrt(2000)
        low, high = result["intervals"][name]
        assert high - low == pytest.approx(2 * half, rel=0.1)
        assert (low + high) / 2 == pytest.approx(result["metrics"][name], abs=half / 5)
    narrow = result["intervals"]["average"]
    assert (narrow[1] - narrow[0]) == pytest.approx((result["intervals"]["locality"][1] - result["intervals"]["locality"][0]) / math.sqrt(2), rel=0.1)


def test_one_case_has_an_interval_of_width_zero_and_rare_probes_do_not_break_it() -> None:
    outcomes = [{"metrics": {"reliability": 0.5, "portability": None}, "probes": {}}] * 9 + [
        {"metrics": {"reliability": 0.5, "portability": 1.0}, "probes": {}}
    ]
    result = means(outcomes)
    assert result["intervals"]["reliability"] == [50.0, 50.0]
    assert result["metrics"]["portability"] == 100.0 and result["intervals"]["portability"] == [100.0, 100.0]
