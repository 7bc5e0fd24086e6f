"""The benchmark runs, says where, and compares edits that are the same: the same steps, the same probabilities, the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "locate.py"


@pytest.mark.slow
def test_every_part_runs_on_toys() -> None:
    run = subprocess.run([sys.executable, str(BENCHMARK), "--quick", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["machine"]["cores"] and result["machine"]["threads"] == 1
    assert len(result["a"]) == len(result["b"]) == 2
    for row in result["a"]:
        assert row["steps"] == [3] and row["ratio"] > 0
        assert row["plain"]["probability"] == pytest.approx(row["errata"]["probability"], rel=1e-2, abs=2e-6)
        assert row["difference"] < 1e-3
    for row in result["c"]:
        assert set(row["ratio"]) == set(row["ridge"])
    for row in result["d"]:
        assert len(row["median"]) == 4 and row["slowest"] > 0
    memory = result["e"]
    assert memory["published"] == 5 * 2 * 256**2 * 4
    for what in ("ridge", "history"):  # buffers have room to grow, so more is held than the shapes say, but not twice as much
        assert memory["computed"][what] <= memory["held"][what] < 2.5 * memory["computed"][what]
        assert memory["peak"][what] > 0
