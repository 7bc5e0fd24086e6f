"""What is in the ledger is there for good: a process killed at any moment leaves it whole, and the next one goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
@pytest.mark.parametrize(("kind", "requests", "places"), [("api", 100, 12), ("cli", 30, 4)])
def test_killed_again_and_again_it_ends_at_the_same_weights(kind: str, requests: int, places: int, tmp_path: Path) -> None:
    """Half of them come at random times, half before a random operation on the disk; `verify` passes after each of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.corrections.killed", kind, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["last"] == told["whole"] and told["left"] == []
    _, made, rejected = told["whole"]
    assert made + rejected == requests and made > 0 and rejected > 0, "both kinds of ends are there"
    assert len({tuple(place) for place in told["places"]}) > places, "killed at many places"
