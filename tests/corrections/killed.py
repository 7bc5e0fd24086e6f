"""A run of requests whose process is killed again and again; started by test_killed.py, as a process of its own that may fork.

"api": `correct`, 100 requests. "cli": `errata edit`, as a user types it, 30 requests.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from errata.cli import call
from errata.corrections import Limits, correct
from errata.edits import EditError
from errata.edits.ledger import Ledger
from errata.facts import EditCase, Fact
from tests.families import language_model
from tests.methods.test_contract import method

COUNTRIES = ("France", "Japan", "Russia", "Spain")
REQUESTS, KILLS = {"api": 100, "cli": 30}, {"api": 50, "cli": 20}
MODEL = Path("tiny")
lm = language_model("llama")
limits = Limits(**{**vars(Limits.read()), "fact": 0.0, "locality": 0.0, "locality_drop": 0.15, "perplexity": 1e9})


def cases() -> list[EditCase]:
    things = ("The river", "The capital", "A town", "The king")
    prompts = [f"{thing} number {number} of {{}} is" for number in range(25) for thing in things]
    return [EditCase(str(i), (Fact(prompt, COUNTRIES[i % 4], "Tokyo" if i % 3 else "Lyon"),)) for i, prompt in enumerate(prompts)]


def run(kind: str, folder: Path) -> None:
    """The whole of it, or what is left."""
    if kind == "cli":
        options = ["--model", str(MODEL), "--set", "ft-m.steps=6", "--facts", "f.jsonl", "--gate", "g.yaml", "--threads", "1"]
        assert call(["edit", "--out", str(folder), *options]) == 1, "some of the requests are rejected"
        return
    with Ledger.write(folder, lm) as ledger:
        correct(lm, ledger, cases(), method("deltaedit", steps=2), limits=limits)


def at_some_operation(count: int) -> None:
    """Die before the count-th thing that this process does to the ledger; most of them fall between an edit's tensors and its row."""
    left = [count]

    def watch(event: str, told: tuple[object, ...]) -> None:
        if event in ("os.rename", "sqlite3.connect", "open", "os.remove", "os.mkdir") and "cut" in str(told[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def child(kind: str, folder: Path, operations: int | None) -> int:
    if pid := os.fork():
        return pid
    if operations:
        at_some_operation(operations)
    try:
        run(kind, folder)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def state(folder: Path) -> tuple[str, int, int]:
    with Ledger.open(folder) as ledger:
        problems = ledger.verify(lm)
        assert not problems, problems
        return ledger.checksum, len(ledger.entries()), len(ledger.rejections())


def main(kind: str, scratch: Path) -> None:
    os.chdir(scratch)
    lm.model.save_pretrained(MODEL)
    lm.tokenizer.save_pretrained(MODEL)
    lines = [case.facts[0].to_dict() for case in cases()[: REQUESTS["cli"]]]
    Path("f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("g.yaml").write_text("fact: 0\nlocality: 0.3\nlocality_drop: 0.01\nperplexity: 1000000000\n")
    began = time.monotonic()
    run(kind, Path("whole"))
    whole, seconds = state(Path("whole")), time.monotonic() - began
    draw, kills, places, starts = random.Random(0), 0, [], 0
    cut = Path("cut")
    while kills < KILLS[kind]:
        starts += 1
        operations = draw.randint(1, 40) if starts % 2 else None
        pid = child(kind, cut, operations)
        if operations is None:
            time.sleep(draw.uniform(0, seconds / (10 if kind == "api" else 3)))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:  # it came to the end before it was killed: once more from the beginning
            assert os.WEXITSTATUS(status) == 0
            assert state(cut) == whole
            cut.rename(f"done-{starts}")
        try:
            places.append(state(cut)[1:])
        except EditError as error:
            assert "holds no ledger" in str(error), error
            places.append((0, 0))
    run(kind, cut)
    last = state(cut)
    left = [str(path) for path in cut.rglob("*") if path.name.endswith(".tmp")]
    print(json.dumps({"whole": whole, "last": last, "places": places, "left": left, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
