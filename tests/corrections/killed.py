"""A run of 100 requests whose process is killed again and again; started by test_killed.py, as a process of its own that may fork."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from errata.corrections import Limits, correct
from errata.edits import EditError
from errata.edits.ledger import Ledger
from errata.facts import EditCase, Fact
from tests.families import language_model
from tests.methods.test_contract import method

COUNTRIES = ("France", "Japan", "Russia", "Spain")
KILLS = 50
lm = language_model("llama")
limits = Limits(**{**vars(Limits.read()), "fact": 0.0, "locality": 0.0, "locality_drop": 0.15, "perplexity": 1e9})


def cases() -> list[EditCase]:
    things = ("The river", "The capital", "A town", "The king")
    prompts = [f"{thing} number {number} of {{}} is" for number in range(25) for thing in things]
    return [EditCase(str(i), (Fact(prompt, COUNTRIES[i % 4], "Tokyo" if i % 3 else "Lyon"),)) for i, prompt in enumerate(prompts)]


def run(folder: Path) -> None:
    """The whole of it, or what is left."""
    with Ledger.write(folder, lm) as ledger:
        correct(lm, ledger, cases(), method("deltaedit", steps=2), limits=limits)


def at_some_operation(count: int) -> None:
    """Die before the count-th thing that this process does to the disk; most of them fall between an edit's tensors and its row."""
    left = [count]

    def watch(event: str, _: object) -> None:
        if event in ("os.rename", "sqlite3.connect", "open", "os.remove", "os.mkdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def child(folder: Path, operations: int | None) -> int:
    if pid := os.fork():
        return pid
    if operations:
        at_some_operation(operations)
    try:
        run(folder)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def state(folder: Path) -> tuple[str, int, int]:
    with Ledger.open(folder) as ledger:
        problems = ledger.verify(lm)
        assert not problems, problems
        return ledger.checksum, len(ledger.entries()), len(ledger.rejections())


def main(scratch: Path) -> None:
    began = time.monotonic()
    run(scratch / "whole")
    whole, seconds = state(scratch / "whole"), time.monotonic() - began
    draw, kills, places, starts = random.Random(0), 0, [], 0
    while kills < KILLS:
        starts += 1
        operations = draw.randint(1, 40) if starts % 2 else None
        pid = child(scratch / "cut", operations)
        if operations is None:
            time.sleep(draw.uniform(0, seconds / 10))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:  # it came to the end before it was killed: once more from the beginning
            assert os.WEXITSTATUS(status) == 0
            assert state(scratch / "cut") == whole
            (scratch / "cut").rename(scratch / f"done-{starts}")
        try:
            places.append(state(scratch / "cut")[1:])
        except EditError as error:
            assert "holds no ledger" in str(error) or "never begun" in str(error), error
            places.append((0, 0))
    run(scratch / "cut")
    last = state(scratch / "cut")
    left = [str(path.relative_to(scratch)) for path in (scratch / "cut").rglob("*") if path.name.endswith(".tmp")]
    print(json.dumps({"whole": whole, "last": last, "places": places, "left": left, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
