"""The speed of evaluation: errata beside the definitions, one text at a time (reference.py), in the same run; and are the numbers equal?

    python benchmarks/evaluation.py                      200 cases of atlas, all edited at once by FT-M: about four minutes
    python benchmarks/evaluation.py --threads 1 --json
    python benchmarks/evaluation.py --quick              on a few cases, to see that it runs

Both measure the same model, unedited and edited: teacher-forced is reliability, generality, portability and locality; top and larger are
efficacy, generalization and specificity. Time includes what is asked of the unedited model, and the tokenizer; not the edit.

errata measures all cases once in each turn (the median counts), the reference a share of them (the sum counts), so that a busy moment of
the machine does not hit one of them alone. CPU seconds leave out the time in which other programs had the core: with one thread they are
what an idle machine would take.
equal: cases of which every value of every probe is the same to the last digit; and so are the tables over all cases, or it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from objective import machine, synchronize
from reference import Reference, accuracy_table, probability_table

import errata
from errata import methods
from errata.data import load as load_data
from errata.edits import Edit
from errata.facts import EditCase
from errata.lm.model import LanguageModel
from errata.metrics import probability, summarise, teacher_forced

Measure = Callable[[Sequence[EditCase]], list[Any]]
"""Cases -> the outcome of each, before and after the edit."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def accuracies(lm: LanguageModel, edit: Edit, cases: Sequence[EditCase]) -> list[Any]:
    before = teacher_forced.unedited(lm, cases)
    with edit.applied_():
        return [score.to_dict() for score in teacher_forced.score_all(lm, cases, before)]


def accuracies_alone(reference: Reference, edit: Edit, cases: Sequence[EditCase]) -> list[Any]:
    before = [reference.local(case) for case in cases]
    with edit.applied_():
        return [reference.accuracies(case, kept) for case, kept in zip(cases, before, strict=True)]


def probabilities(lm: LanguageModel, edit: Edit, cases: Sequence[EditCase]) -> list[Any]:
    before = probability.unedited(lm, cases)
    with edit.applied_():
        return [score.to_dict() for score in probability.score_all(lm, cases, before)]


def probabilities_alone(reference: Reference, edit: Edit, cases: Sequence[EditCase]) -> list[Any]:
    before = [reference.originals(case) for case in cases]
    with edit.applied_():
        return [reference.probabilities(case, kept) for case, kept in zip(cases, before, strict=True)]


def clocked(measure: Measure, cases: Sequence[EditCase], device: torch.device) -> tuple[list[Any], float, float]:
    """What it gives, seconds, and seconds of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = measure(cases)
    synchronize(device)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, ours: Measure, alone: Measure, cases: Sequence[EditCase], turns: int, device: torch.device) -> tuple[Any, ...]:
    """The row of a part, and the outcomes of both."""
    ours(cases[:2]), alone(cases[:2])  # to warm up
    times, each, outcomes = [], [], []
    for turn in range(turns):
        found, *seconds = clocked(ours, cases, device)
        times.append(seconds)
        some, *seconds = clocked(alone, cases[turn::turns], device)
        each.append(seconds)
        outcomes.append(some)
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    one_wall, one_cpu = (sum(column) for column in zip(*each, strict=True))
    slow = [outcomes[number % turns][number // turns] for number in range(len(cases))]
    row = {
        "part": name,
        "cases": len(cases),
        "seconds": wall,
        "cpu_seconds": cpu,
        "one by one": {"seconds": one_wall, "cpu_seconds": one_cpu},
        "ratio": one_wall / wall,
        "ratio, CPU": one_cpu / cpu,
    }
    say(f"{name}: {row['ratio']:.1f} ×")
    return row, found, slow


def measure(lm: LanguageModel, edit: Edit, cases: Sequence[EditCase], turns: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    reference = Reference(lm.model, lm.tokenizer)
    forced, found, slow = compare(
        "teacher-forced", lambda c: accuracies(lm, edit, c), lambda c: accuracies_alone(reference, edit, c), cases, turns, lm.device
    )
    forced["equal"] = sum(one["probes"] == other for one, other in zip(found, slow, strict=True))
    forced["table"] = accuracy_table(slow)
    forced["same table"] = forced["table"].items() <= summarise(found).items()
    larger, found, slow = compare(
        "top and larger", lambda c: probabilities(lm, edit, c), lambda c: probabilities_alone(reference, edit, c), cases, turns, lm.device
    )
    larger["equal"] = sum({"id": one["id"], **other} == one for one, other in zip(found, slow, strict=True))
    larger["table"] = probability_table(slow)
    larger["same table"] = larger["table"].items() <= probability.summarise(found).items()
    rows = [forced, larger]
    both: dict[str, Any] = {"part": "both", "cases": len(cases), "one by one": {}}
    for kind, ratio in (("seconds", "ratio"), ("cpu_seconds", "ratio, CPU")):
        both[kind] = sum(row[kind] for row in rows)
        both["one by one"][kind] = sum(row["one by one"][kind] for row in rows)
        both[ratio] = both["one by one"][kind] / both[kind]
    both |= {"equal": min(row["equal"] for row in rows), "same table": all(row["same table"] for row in rows)}
    return [*rows, both]


def show(result: dict[str, Any]) -> None:
    where = result["machine"]
    print(f"{where['device']}, {where['cpu']}, {where['cores']} cores, {where['threads']} threads, load {where['load']:.1f}; ", end="")
    print(f"torch {where['torch']}; atlas, {where['dtype']}, edited by {result['method']}")
    print(f"{'':16}{'cases':>6}{'seconds':>9}{'cases/s':>9}{'alone s':>9}{'cases/s':>9}{'ratio':>7}{'CPU ratio':>11}{'equal':>12}")
    for row in result["rows"]:
        one = row["one by one"]["seconds"]
        print(
            f"{row['part']:16}{row['cases']:6}{row['seconds']:9.2f}{row['cases'] / row['seconds']:9.1f}{one:9.2f}{row['cases'] / one:9.2f}"
            f"{row['ratio']:7.1f}{row['ratio, CPU']:11.1f}{row['equal']:6} / {row['cases']}{'' if row['same table'] else '  other tables'}"
        )
    for row in result["rows"]:
        if "table" in row:
            print(", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in row["table"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--method", default="ft-m", help="makes one edit of all cases")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(cases=6, turns=2)
    torch.set_num_threads(args.threads)
    lm = errata.load("atlas", device=args.device)
    cases = load_data("atlas", split="test")[: args.cases]
    say(f"{args.method} makes one edit of {len(cases)} cases")
    edit = errata.edit(lm, [fact for case in cases for fact in case.facts], method=methods.get(args.method))
    rows = measure(lm, edit, cases, args.turns)
    where = machine(lm.device) | {"dtype": str(lm.dtype).removeprefix("torch.")}
    result: dict[str, Any] = {"machine": where, "method": args.method, "turns": args.turns, "rows": rows}
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
