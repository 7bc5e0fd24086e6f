"""The benchmark runs, says where, and its exact part (peak memory) is what the objective promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "objective.py"


def test_overtone_needs_no_more_memory_than_cross_entropy() -> None:
    small = {"edits": 2, "tokens": 2, "prompt": 4, "layers": 1, "width": 64, "repeats": 1}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARK), "--json", "--vocab", "4000", "8000", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout)
    assert result["machine"]["cores"] and result["machine"]["torch"] and result["step"]["vocab"] == 8000
    for v, row in result["objectives"].items():
        logits = 2 * 2 * int(v) * 4  # bytes
        assert row["overtone"]["peak_bytes"] < 2.1 * logits
        assert row["overtone"]["peak_bytes"] <= row["ce"]["peak_bytes"]
        assert all(r["seconds"] > 0 for r in row.values())
