"""Many single edits at once: edits per second beside the same edits one by one, in the same run, the measurement of each included.

    python benchmarks/single.py                                  LoRA, FT-M and FT-L with both objectives on atlas: about ten minutes
    python benchmarks/single.py --methods lora --batch 64
    python benchmarks/single.py --workers 2                      in batches, and these in two processes (`errata bench --workers 2`)
    python benchmarks/single.py --one-run                        all objectives of a method as rows of one run
    python benchmarks/single.py --quick                          on a few cases with few steps, to see that it runs

One by one is what `errata bench` does with `batch: 1`: ask the unedited model, edit, apply, measure (teacher-forced probes and greedy
generation), revert. In batches is what it does otherwise. The cases one by one are as many of the first of the others as `--alone` says.
Some cases at the end of the split are for warming up and are not counted, nor is the start of the workers (each has an even share of the
threads; one by one has them all). editing, measuring, asking: how many times as fast each part is, of workers times their number; asking
is what is left: the unedited model for the most part, and workers that wait for the last one.

Without --one-run the unedited model is asked anew for every line of the table, in both ways. With it, it is asked once for all objectives,
as `errata bench` does, in both ways; and in batches the second one finds what runs before the edit of the first can be felt.

alike: of the cases made both ways, those with the same accuracy of every probe and the same text. difference: the largest of a probe's
accuracy. Rounding is not the same in both ways, and Adam makes a full step of a gradient that is nothing but rounding, so in float32 a
case near the edge may fall to the other side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from objective import machine

import errata
from errata.bench import batches
from errata.bench.plan import Plan, Row
from errata.bench.run import parts
from errata.bench.single import Single, line
from errata.bench.tasks import Task
from errata.bench.workers import Workers
from errata.data import load as load_data
from errata.facts import EditCase
from errata.lm.model import LanguageModel
from errata.methods import Method
from errata.metrics import teacher_forced
from errata.objectives import Objective

Record = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Setups = Sequence[tuple[Row, Method, Objective]]


def one_by_one(rows: Setups, lm: LanguageModel, cases: Sequence[EditCase]) -> list[Record]:
    known: dict[str, teacher_forced.Tokens] = {}
    return [line(*row, lm, case, known) for row in rows for case in cases]


def in_batches(rows: Setups, lm: LanguageModel, cases: Sequence[EditCase], size: int) -> list[Record]:
    groups, before = [cases[first : first + size] for first in range(0, len(cases), size)], batches.Before()
    return [line for row in rows for group in groups for line in batches.lines(*row, lm, group, before)]


def setups(plan: Plan) -> Setups:
    return [(row, *parts(row.method, row.objective, plan.settings)) for row in plan.rows]


def begin(plan: Plan, device: str, threads: int) -> Single:
    """What a worker does its batches with."""
    torch.set_num_threads(threads)
    return Single(plan, setups(plan), errata.load("atlas", device=device))


def in_workers(plan: Plan, cases: Sequence[EditCase], warm: Sequence[EditCase], args: argparse.Namespace) -> tuple[list[Record], float]:
    """The lines of `cases`, row by row, and seconds in all. Each worker begins with as many of `warm`."""
    groups = [cases[first : first + args.batch] for first in range(0, len(cases), args.batch)]
    with Workers(args.workers, partial(begin, plan, args.device, max(1, args.threads // args.workers))) as team:
        list(team.done([Task(0, tuple(warm), len(warm))] * args.workers))
        start = time.perf_counter()
        tasks = [Task(row, tuple(group), len(group)) for row in range(len(plan.rows)) for group in groups]
        made = [line for _, line in team.done(tasks)]
        seconds = time.perf_counter() - start
    found = {(line["objective"], line["case"]): line for line in made}
    return [found[row.objective, case.id] for row in plan.rows for case in cases], seconds


def compare(name: str, objectives: Sequence[str], lm: LanguageModel, dev: Sequence[EditCase], args: argparse.Namespace) -> Record:
    settings = {name: {"steps": args.steps}} if args.steps else {}
    plan = Plan("atlas", "atlas", (name,), tuple(objectives), batch=args.batch, settings=settings)
    rows, cases, warm = setups(plan), dev[: args.edits], dev[args.edits :][: args.batch]
    if args.workers > 1:
        batched, seconds = in_workers(plan, cases, warm, args)
    else:
        in_batches(rows[:1], lm, warm, args.batch)
        start = time.perf_counter()
        batched = in_batches(rows, lm, cases, args.batch)
        seconds = time.perf_counter() - start
    together = seconds / len(batched)
    one_by_one(rows[:1], lm, warm[:2])
    start = time.perf_counter()
    alone = one_by_one(rows, lm, cases[: args.alone])
    each = (time.perf_counter() - start) / len(alone)
    same = {(line["objective"], line["case"]): line for line in batched}
    pairs = [(same[theirs["objective"], theirs["case"]], theirs) for theirs in alone]
    shares = {part: {"alone": _mean(alone, part), "batch": _mean(batched, part)} for part in ("edit", "measure")}
    left = {"alone": each, "batch": together * args.workers}
    shares["ask"] = {way: whole - sum(share[way] for share in shares.values()) for way, whole in left.items()}
    found = {
        "method": name,
        "objective": "+".join(objectives),
        "edits": len(batched),
        "alone": len(alone),
        "edits per second, one by one": 1 / each,
        "edits per second, in batches": 1 / together,
        "ratio": each / together,
        "ratios": {part: share["alone"] / share["batch"] * args.workers for part, share in shares.items()},
        "seconds": shares,
        "alike": sum(_answers(ours) == _answers(theirs) for ours, theirs in pairs),
        "difference": max(abs(a - b) for ours, theirs in pairs for a, b in zip(_values(ours), _values(theirs), strict=True)),
        "steps": max(abs(ours["diagnostics"]["steps"] - theirs["diagnostics"]["steps"]) for ours, theirs in pairs),
    }
    say(f"{name}+{found['objective']}: {found['ratio']:.1f} ×")
    return found


def _mean(records: Sequence[Record], part: str) -> float:
    return sum(record["seconds"][part] for record in records) / len(records)


def _answers(record: Record) -> Any:
    return record["probes"], record["generation"]


def _values(record: Record) -> list[float]:
    """The accuracy of every probe."""
    return [value for groups in record["probes"].values() for values in groups.values() for value in values]


def show(result: Record) -> None:
    where = result["machine"]
    print(f"{where['device']}, {where['cpu']}, {where['cores']} cores, {where['threads']} threads, load {where['load']:.1f}; ", end="")
    print(f"torch {where['torch']}; {result['batch']} edits in a batch, {result['workers']} workers, {where['dtype']}")
    print(
        f"{'':18}{'edits':>7}{'edits/s':>9}{'alone':>9}{'ratio':>8}{'editing':>9}{'measuring':>11}{'asking':>8}"
        f"{'alike':>11}{'difference':>12}{'steps':>7}"
    )
    for row in result["rows"]:
        print(
            f"{row['method'] + '+' + row['objective']:18}{row['edits']:7}{row['edits per second, in batches']:9.2f}"
            f"{row['edits per second, one by one']:9.2f}{row['ratio']:8.1f}{row['ratios']['edit']:9.1f}{row['ratios']['measure']:11.1f}"
            f"{row['ratios']['ask']:8.1f}{row['alike']:6} / {row['alone']:<3}{row['difference']:12.2g}{row['steps']:7}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["lora", "ft-m", "ft-l"])
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=["ce", "overtone"])
    parser.add_argument("--edits", type=int, default=128)
    parser.add_argument("--alone", type=int, default=16, help="of them so many one by one")
    parser.add_argument("--batch", type=int, default=0, help="edits side by side; default: what `errata bench` takes")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the batches")
    parser.add_argument("--one-run", action="store_true", help="all objectives of a method are rows of one run")
    parser.add_argument("--steps", type=int, help="default: the method's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(methods=["lora", "ft-m"], objectives=["ce"], edits=5, alone=3, batch=3, steps=2)
    torch.set_num_threads(args.threads)
    lm = errata.load("atlas", device=args.device)
    args.batch = args.batch or batches.fitting(lm)
    dev = load_data("atlas", split="dev")
    result: Record = {"machine": machine(lm.device) | {"dtype": str(lm.dtype).removeprefix("torch.")}, "batch": args.batch}
    result["workers"] = args.workers
    runs = [args.objectives] if args.one_run else [[objective] for objective in args.objectives]
    result["rows"] = [compare(name, objectives, lm, dev, args) for name in args.methods for objectives in runs]
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
