"""The benchmark runs, says where, and compares edits that are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "single.py"


@pytest.mark.slow
def test_both_ways_give_the_same() -> None:
    run = subprocess.run([sys.executable, str(BENCHMARK), "--quick", "--json", "--threads", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["machine"]["cores"] and result["machine"]["threads"] == 1 and result["batch"] == 3
    assert [row["method"] for row in result["rows"]] == ["lora", "ft-m"]
    for row in result["rows"]:
        assert row["alike"] == row["alone"] == 3 and row["difference"] == 0 and row["ratio"] > 0
