"""Many single edits at once: edits per second beside the same edits one by one, in the same run, the measurement of each included.

    python benchmarks/single.py                                  LoRA, FT-M and FT-L with both objectives on atlas: about ten minutes
    python benchmarks/single.py --methods lora --batch 64
    python benchmarks/single.py --workers 2                      in batches, and these in two processes (`errata bench --workers 2`)
    python benchmarks/single.py --quick                          on a few cases with few steps, to see that it runs

One by one is what `errata bench` does with `batch: 1`: ask the unedited model, edit, apply, measure (teacher-forced probes and greedy
generation), revert. In batches is what it does otherwise. The cases one by one are as many of the first of the others as `--alone` says.
Some cases at the end of the split are for warming up and are not counted, nor is the start of the workers (each has an even share of the
threads; one by one has them all). editing, measuring: how many times as fast each part is; of workers the mean over all of them, times
their number.

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

Record = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def one_by_one(row: Row, lm: LanguageModel, cases: Sequence[EditCase], settings: Record) -> list[Record]:
    method, objective = parts(row.method, row.objective, settings)
    return [line(row, method, objective, lm, case, {}) for case in cases]


def in_batches(row: Row, lm: LanguageModel, cases: Sequence[EditCase], settings: Record, size: int) -> list[Record]:
    method, objective = parts(row.method, row.objective, settings)
    groups = [cases[first : first + size] for first in range(0, len(cases), size)]
    return [line for group in groups for line in batches.lines(row, method, objective, lm, group, batches.Before())]


def begin(plan: Plan, device: str, threads: int) -> Single:
    """What a worker does its batches with."""
    torch.set_num_threads(threads)
    row = plan.rows[0]
    return Single(plan, [(row, *parts(row.method, row.objective, plan.settings))], errata.load("atlas", device=device))


def in_workers(
    row: Row, cases: Sequence[EditCase], warm: Sequence[EditCase], settings: Record, args: argparse.Namespace
) -> tuple[list[Record], float]:
    """The lines of `cases`, and seconds in all. Each worker begins with as many of `warm`."""
    plan = Plan("atlas", "atlas", (row.method,), (row.objective,), batch=args.batch, settings=settings)
    groups = [cases[first : first + args.batch] for first in range(0, len(cases), args.batch)]
    with Workers(args.workers, partial(begin, plan, args.device, max(1, args.threads // args.workers))) as team:
        list(team.done([Task(0, tuple(warm), len(warm))] * args.workers))
        start = time.perf_counter()
        made = [line for _, line in team.done([Task(0, tuple(group), len(group)) for group in groups])]
        seconds = time.perf_counter() - start
    found = {line["case"]: line for line in made}
    return [found[case.id] for case in cases], seconds


def compare(name: str, objective: str, lm: LanguageModel, dev: Sequence[EditCase], args: argparse.Namespace) -> Record:
    row, settings = Row(name, objective, 0), {name: {"steps": args.steps}} if args.steps else {}
    cases, warm = dev[: args.edits], dev[args.edits :][: args.batch]
    if args.workers > 1:
        batched, seconds = in_workers(row, cases, warm, settings, args)
    else:
        in_batches(row, lm, warm, settings, args.batch)
        start = time.perf_counter()
        batched = in_batches(row, lm, cases, settings, args.batch)
        seconds = time.perf_counter() - start
    together = seconds / len(cases)
    one_by_one(row, lm, warm[:2], settings)
    start = time.perf_counter()
    alone = one_by_one(row, lm, cases[: args.alone], settings)
    each = (time.perf_counter() - start) / len(alone)
    pairs = list(zip(batched, alone, strict=False))
    found = {
        "method": name,
        "objective": objective,
        "edits": len(cases),
        "alone": len(alone),
        "edits per second, one by one": 1 / each,
        "edits per second, in batches": 1 / together,
        "ratio": each / together,
        "ratio, editing": _mean(alone, "edit") / _mean(batched, "edit") * args.workers,
        "ratio, measuring": _mean(alone, "measure") / _mean(batched, "measure") * args.workers,
        "seconds": {part: {"alone": _mean(alone, part), "batch": _mean(batched, part)} for part in ("edit", "measure")},
        "alike": sum(_answers(ours) == _answers(theirs) for ours, theirs in pairs),
        "difference": max(abs(a - b) for ours, theirs in pairs for a, b in zip(_values(ours), _values(theirs), strict=True)),
        "steps": max(abs(ours["diagnostics"]["steps"] - theirs["diagnostics"]["steps"]) for ours, theirs in pairs),
    }
    say(f"{name}+{objective}: {found['ratio']:.1f} ×")
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
        f"{'':16}{'edits':>7}{'edits/s':>9}{'alone':>9}{'ratio':>8}{'editing':>9}{'measuring':>11}{'alike':>10}{'difference':>12}{'steps':>7}"
    )
    for row in result["rows"]:
        print(
            f"{row['method'] + '+' + row['objective']:16}{row['edits']:7}{row['edits per second, in batches']:9.2f}"
            f"{row['edits per second, one by one']:9.2f}{row['ratio']:8.1f}{row['ratio, editing']:9.1f}{row['ratio, measuring']:11.1f}"
            f"{row['alike']:6} / {row['alone']}{row['difference']:12.2g}{row['steps']:7}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["lora", "ft-m", "ft-l"])
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=["ce", "overtone"])
    parser.add_argument("--edits", type=int, default=128)
    parser.add_argument("--alone", type=int, default=16, help="of them so many one by one")
    parser.add_argument("--batch", type=int, default=0, help="edits side by side; default: what `errata bench` takes")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the batches")
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
    result["rows"] = [compare(name, objective, lm, dev, args) for name in args.methods for objective in args.objectives]
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
