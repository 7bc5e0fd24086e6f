"""What a locate-then-edit edit costs: errata beside the same edits made plainly, as published (plain.py), in the same run.

    python benchmarks/locate.py                          everything: about 40 minutes on one core, 6 GB of memory
    python benchmarks/locate.py --parts a,b --models atlas      two minutes
    python benchmarks/locate.py --parts c --widths 6400         a minute
    python benchmarks/locate.py --quick                         every part on toys, to see that it runs

a  seconds per edit by stage, strictly one by one, both taking all steps, in turns with the order changing from edit to edit
b  a batch of facts in one edit, against the plain way one by one
c  the solve alone: Ridge.solve and Ridge.remember, against one dense torch.linalg.solve
d  seconds per edit from the first to the last: the write rule alone, and whole edits
e  memory of the write rule alone at Llama-3-8B's widths, against projector and K_p K_pᵀ as published

Models: the bundled one, and one of GPT-2 small's shape with random weights (and atlas's tokenizer), critical layers 3 to 7.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import torch
from objective import machine
from plain import Plain
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import errata
from errata.bench.memory import MB, watch_peak
from errata.data import load as load_data
from errata.facts import Fact
from errata.lm.model import LanguageModel
from errata.methods import MEMIT, AlphaEdit, DeltaEdit
from errata.methods.locate.history import DeltaHistory
from errata.methods.locate.ridge import Prior, Ridge, inverse_prior, null_space_prior
from errata.statistics.nullspace import NullSpace

METHODS = {"memit": MEMIT(), "memit+history": MEMIT(history=True), "alphaedit": AlphaEdit(), "deltaedit": DeltaEdit(preset="paper")}
STAGES = ("keys", "value", "write", "total")
KEPT = 0.7  # share of the dimensions in the null space, what 2e-2 keeps on Llama-3
LLAMA = {"size": 4096, "width": 14336, "layers": 5, "edits": 3000}
WIDEST_IN_DOUBLE = 8000  # beyond it the dense solve is done in float32, as published
Row = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def facts_of_atlas() -> list[Fact]:
    return [case.facts[0] for case in load_data("atlas", split="dev")]


def models(name: str, args: argparse.Namespace) -> tuple[LanguageModel, LanguageModel, dict[str, Any]]:
    """The model twice, for errata and for the plain way, and the settings that go with it."""
    lm = errata.load("atlas", device="cpu")
    settings: dict[str, Any] = {"stop": 0.0, "corpus": "bundled", "tokens": args.tokens}
    if name == "gpt2-small":
        shape = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 4000} if args.quick else {}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        with torch.no_grad():  # else most of the prefixes' tokens would be none of the tokenizer's, and the prefixes short
            model.transformer.wte.weight[len(lm.tokenizer) :] *= 0.01
        lm = LanguageModel(model, lm.tokenizer, "GPT-2 small's shape")
        settings |= {"steps": 20, "layers": (1, 2) if args.quick else (3, 4, 5, 6, 7)}
    if args.steps:
        settings["steps"] = args.steps
    return lm, LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, lm.name), settings


class Pair:
    """One sequence, made by errata and by the plain way, each on its own copy of the model."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        ours, theirs, settings = models(name, args)
        self.method = replace(METHODS[args.method], **settings).for_model(ours)
        say(f"{name}: prefixes, moments and factors")
        self.original = {path: _weight(ours, path).clone() for path in (ours.anatomy.mlp_down[i] for i in self.method.layers or ())}
        self.ours, self.theirs = ours, theirs
        self.session, self.plain = self.method.start(ours), Plain(theirs, self.method)

    def errata(self, facts: list[Fact]) -> Row:
        total, (edit, writing) = timed(lambda: _edit(self.session, facts))
        stages = {stage: edit.diagnostics[f"seconds_{stage}"] for stage in STAGES[:3]}
        stages["write"] += writing
        return {**stages, "total": total, "probability": edit.diagnostics["probability"], "steps": edit.diagnostics["steps"]}

    def as_published(self, facts: list[Fact]) -> Row:
        total, made = timed(lambda: self.plain.edit(facts))
        return {**made.seconds, "total": total, "probability": statistics.mean(made.probability), "steps": max(made.steps)}

    def difference(self) -> float:
        """How far apart the weights are, relative to how far they moved: the largest over the layers."""
        return max(
            float((_weight(self.ours, path) - _weight(self.theirs, path)).norm() / (_weight(self.theirs, path) - original).norm())
            for path, original in self.original.items()
        )

    def describe(self) -> Row:
        anatomy = self.ours.anatomy
        return {
            "model": f"{self.ours.name}: {len(anatomy.layers)} layers, d {anatomy.hidden_size}, d_in {anatomy.key_size}",
            "method": self.method.name,
            "layers": list(self.method.layers or ()),
        }


def _edit(session: Any, facts: list[Fact]) -> tuple[Any, float]:
    edit = session.edit(facts)
    writing, _ = timed(edit.apply)
    return edit, writing


def _weight(lm: LanguageModel, path: str) -> Tensor:
    weight: Tensor = lm.anatomy.weight(lm.model, path)
    return weight.detach()


def _medians(rows: list[Row]) -> Row:
    return {stage: statistics.median(row[stage] for row in rows) for stage in STAGES}


def one_by_one(args: argparse.Namespace) -> list[Row]:
    """a. The first edit of each is for warming up and is not counted."""
    found = []
    for name in args.models:
        pair = Pair(name, args)
        rows: dict[str, list[Row]] = {"plain": [], "errata": []}
        run = {"plain": pair.as_published, "errata": pair.errata}
        for i, fact in enumerate(facts_of_atlas()[: args.edits[name] + 1]):
            for which in ("plain", "errata") if i % 2 else ("errata", "plain"):
                rows[which].append(run[which]([fact]))
            say(f"  edit {i}: plain {rows['plain'][-1]['total']:.2f} s, errata {rows['errata'][-1]['total']:.2f} s")
        row: Row = {**pair.describe(), "edits": args.edits[name], "difference": pair.difference()}
        for which, all_rows in rows.items():
            counted = all_rows[1:]
            row[which] = {**_medians(counted), "probability": statistics.mean(r["probability"] for r in counted)}
            row["steps"] = sorted({r["steps"] for r in counted} | set(row.get("steps", ())))
        row["ratio"] = statistics.median(p["total"] / e["total"] for p, e in zip(rows["plain"][1:], rows["errata"][1:], strict=True))
        found.append(row)
    return found


def batches(args: argparse.Namespace) -> list[Row]:
    """b. The plain way is timed on a few facts, one by one, and multiplied."""
    found = []
    for name in args.models:
        pair, facts = Pair(name, args), facts_of_atlas()
        pair.errata(facts[:2])
        pair.as_published(facts[:1])
        facts, size, few = facts[2:], args.batch, args.few
        ours = []
        for i in range(args.batches):
            ours.append(pair.errata(facts[i * size : (i + 1) * size]))
            say(f"  batch {i}: {ours[-1]['total']:.2f} s")
        plain = [pair.as_published([fact]) for fact in facts[:few]]
        median, theirs = _medians(ours), _medians(plain)
        together = size * (theirs["keys"] + theirs["value"]) + theirs["write"]
        found.append(
            {
                **pair.describe(),
                "batch": size,
                "batches": args.batches,
                "plain facts timed": few,
                "errata": median | {"probability": statistics.mean(row["probability"] for row in ours)},
                "plain": {stage: size * seconds for stage, seconds in theirs.items()}
                | {"probability": statistics.mean(row["probability"] for row in plain)},
                "plain, one solve": together,
                "ratio": size * theirs["total"] / median["total"],
                "ratio, one solve": together / median["total"],
            }
        )
    return found


def _space(width: int) -> NullSpace:
    """A null space of the usual size. Its basis is made of unit vectors: products take as long with any numbers in them."""
    rest = width - round(KEPT * width)
    return NullSpace(torch.eye(width, rest, dtype=torch.float64), True, width - rest, None, 1.0)


def _keys(width: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _per_edit(ridge: Ridge, keys: Tensor) -> list[float]:
    """Seconds of a solve and a remember, key by key."""

    def edit(key: Tensor) -> None:
        ridge.solve(key)
        ridge.remember(key)

    return [timed(lambda key=key: edit(key))[0] for key in keys.split(1)]  # type: ignore[misc]


def solves(args: argparse.Namespace) -> list[Row]:
    """c."""
    found = []
    for width in args.widths:
        dtype = torch.float64 if width <= WIDEST_IN_DOUBLE else torch.float32
        repeats = args.dense if width <= WIDEST_IN_DOUBLE else 1
        key = _keys(width, 1).to(dtype).T
        some = _keys(width, 32, seed=1).to(dtype)
        matrix = some.T @ some
        matrix.diagonal().add_(1)
        torch.linalg.solve(matrix[:256, :256], key[:256])  # the library's first call
        say(f"d_in {width}: dense, {dtype}")
        dense = statistics.median(timed(lambda m=matrix, k=key: torch.linalg.solve(m, k))[0] for _ in range(repeats))  # type: ignore[misc]
        del matrix
        rows: dict[str, float] = {}
        for rule, prior, folded in _rules(width):
            gc.collect()
            ridge = Ridge(prior, width, fold_at=width * width)
            if folded:  # becoming dense costs a few dense solves, once; what is in the matrix does not change the time
                ridge.load_state_dict({"count": 0, "recent": torch.zeros(0, width), "dense": torch.eye(width, dtype=torch.float64)})
            else:
                ridge.remember(_keys(width, min(args.earlier, width // 4), seed=2))
            say(f"d_in {width}: {rule}")
            _per_edit(ridge, _keys(width, 2, seed=3))
            rows[rule] = statistics.mean(_per_edit(ridge, _keys(width, args.solves, seed=4)))
            del ridge, prior
        row = {"width": width, "dtype": str(dtype), "repeats": repeats, "earlier": min(args.earlier, width // 4), "dense": dense}
        found.append(row | {"ridge": rows, "ratio": {rule: dense / seconds for rule, seconds in rows.items()}})
    return found


def _rules(width: int) -> Iterator[tuple[str, Prior, bool]]:
    """One at a time: at 14,336 each holds gigabytes."""
    yield "null space, low rank", null_space_prior(_space(width).project, 1.0), False
    yield "moments, low rank", inverse_prior(torch.eye(width, dtype=torch.float64)), False
    yield "any, dense", lambda rows: rows, True


def curve(args: argparse.Namespace) -> list[Row]:
    """d."""
    found = []
    width, count = args.curve_width, args.curve
    for form, fold_at in (("default", None), ("low rank, dense from d_in/2", width // 2)):
        say(f"{count} keys, d_in {width}, {form}")
        ridge = Ridge(null_space_prior(_space(width).project, 1.0), width, fold_at=fold_at)
        _per_edit(Ridge(null_space_prior(_space(width).project, 1.0), width), _keys(width, 4, seed=5))
        found.append(_in_blocks(f"write rule, d_in {width}, {form}", _per_edit(ridge, _keys(width, count)), args.blocks))
    for name in args.curve_methods:
        lm, _, settings = models("atlas", args)
        session = replace(METHODS[name], **settings).start(lm)
        found.append(_in_blocks(f"whole edits, atlas, {name}", _whole(session, facts_of_atlas(), args.whole), args.blocks))
    return found


def _whole(session: Any, facts: list[Fact], count: int) -> list[float]:
    """Seconds of each edit after the first, which warms up. Facts that have run out come again."""
    times = []
    for i in range(count + 1):
        times.append(timed(lambda i=i: _edit(session, [facts[i % len(facts)]]))[0])  # type: ignore[misc]
        if i % 25 == 0:
            say(f"  {session.method.name}, edit {i}: {times[-1]:.2f} s")
    return times[1:]


def _in_blocks(what: str, times: list[float], blocks: int) -> Row:
    size = math.ceil(len(times) / blocks)
    parts = [times[i : i + size] for i in range(0, len(times), size)]
    medians = [statistics.median(part) for part in parts]
    return {
        "what": what,
        "edits": len(times),
        "block": size,
        "median": medians,
        "mean": [statistics.mean(part) for part in parts],
        "slowest": max(times),
        "last / first": medians[-1] / medians[0],
        "largest / smallest": max(medians) / min(medians),
    }


def memory(args: argparse.Namespace) -> Row:
    """e. One layer in a process of its own, times the number of layers; AlphaEdit's rule, and what DeltaEdit adds at the last layer."""
    shape = {"size": 64, "width": 256, "layers": 5, "edits": 60} if args.quick else LLAMA
    size, width, layers = shape["size"], shape["width"], shape["layers"]
    row: Row = {"shape": shape, "published": layers * 2 * width * width * 4}
    for what in ("ridge", "history"):
        say(f"memory of the {what} at {shape}")
        command = [sys.executable, __file__, "--probe", json.dumps({"what": what, "threads": args.threads, **shape})]
        row[what] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rest = width - round(KEPT * width)
    once = min(shape["edits"] * (size + width), size * width) + min(shape["edits"], size) * size
    row["computed"] = {"ridge": layers * 8 * (width * rest + shape["edits"] * width), "history": 8 * once}
    row["held"] = {"ridge": layers * (row["ridge"]["prior"] + row["ridge"]["history"]), "history": row["history"]["history"]}
    row["peak"] = {"ridge": layers * row["ridge"]["peak"], "history": row["history"]["peak"]}
    return row


def probe(shape: Row) -> Row:
    """In the other process: bytes by the objects' own account, and what the process grew by at its peak."""
    torch.set_num_threads(shape["threads"])
    size, width, edits = shape["size"], shape["width"], shape["edits"]
    _ = torch.linalg.cholesky(torch.eye(64, dtype=torch.float64) + _keys(64, 64) @ _keys(64, 64).T)  # the libraries' own memory
    before, peak = psutil.Process().memory_info().rss, watch_peak(torch.device("cpu"))
    if shape["what"] == "ridge":
        space = _space(width)
        ridge = Ridge(null_space_prior(space.project, 1.0), width)
        for start in range(0, edits, 20):  # a few at a time: only what is kept counts here
            keys = _keys(width, min(20, edits - start), seed=start)
            ridge.solve(keys)
            ridge.remember(keys)
        held = {"prior": space.basis.nbytes, "history": ridge.nbytes}
    else:
        history = DeltaHistory(size, width)
        for start in range(0, edits, 20):
            count = min(20, edits - start)
            history.add(_keys(size, count, seed=start).T, _keys(width, count, seed=start + 1))
        history.directions(int(0.75 * size))
        held = {"prior": 0, "history": history.nbytes}
    return {**held, "peak": int(peak() * MB) - before}


def show(result: Row) -> None:
    print(" · ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for row in result.get("a", ()):
        print(f"\na. one by one: {row['model']}; {row['method']}, layers {row['layers']}, {row['edits']} edits, {row['steps']} steps")
        _stages(row)
        print(f"   ratio {row['ratio']:.1f} (median over edits); weights differ by {row['difference']:.1e} of what they moved (float32)")
    for row in result.get("b", ()):
        print(f"\nb. {row['batch']} facts in one edit: {row['model']}; {row['method']}, median of {row['batches']} batches")
        print(f"   plain: one by one, {row['plain facts timed']} facts timed, times {row['batch']}; p(target) of each over what was timed")
        _stages(row)
        print(
            f"   ratio {row['ratio']:.1f}; {row['ratio, one solve']:.1f} against values one by one but one solve for all "
            f"({row['plain, one solve']:.1f} s)"
        )
    for row in result.get("c", ()):
        print(f"\nc. solve at d_in {row['width']}: dense {row['dense']:.2f} s ({row['dtype']}, {row['repeats']} times)")
        for rule, seconds in row["ridge"].items():
            after = "" if rule.endswith("dense") else f", {row['earlier']} earlier keys"
            print(f"   {rule + after:45}{1e3 * seconds:9.1f} ms   ratio {row['ratio'][rule]:7.0f}")
    for row in result.get("d", ()):
        print(f"\nd. {row['what']}: ms per edit in blocks of {row['block']}, {row['edits']} edits")
        for kind in ("median", "mean"):
            print(f"   {kind:7}" + "".join(f"{1e3 * value:8.1f}" for value in row[kind]))
        print(
            f"   medians: last / first {row['last / first']:.2f}, largest / smallest {row['largest / smallest']:.2f}; "
            f"slowest edit {1e3 * row['slowest']:.0f} ms"
        )
    if row := result.get("e"):
        print("\ne. memory of the write rule, GiB: " + ", ".join(f"{name} {value}" for name, value in row["shape"].items()))
        print(f"   as published, projector and K_p K_pᵀ of every layer in float32: {row['published'] / 2**30:.2f}")
        for name, label in (("ridge", "AlphaEdit's rule, all layers"), ("history", "DeltaEdit's Δ_hist, last layer")):
            sizes = "".join(f"   {kind} {row[kind][name] / 2**30:6.2f}" for kind in ("computed", "held", "peak"))
            print(f"   {label:45}{sizes}")
        print("   computed: from the shapes; held: nbytes, with room to grow; peak: growth of a process with one layer, times layers")
        total = row["peak"]["ridge"]
        print(f"   published / peak: {row['published'] / total:.2f}")


def _stages(row: Row) -> None:
    print("   " + f"{'':8}" + "".join(f"{stage + ' s':>12}" for stage in STAGES) + f"{'p(target)':>12}")
    for which in ("plain", "errata"):
        times = "".join(f"{row[which][stage]:12.3f}" for stage in STAGES)
        print(f"   {which:8}{times}{row[which]['probability']:12.3g}")
    print(f"   {'ratio':8}" + "".join(f"{row['plain'][stage] / row['errata'][stage]:12.1f}" for stage in STAGES))


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"a": one_by_one, "b": batches, "c": solves, "d": curve, "e": memory}
QUICK: Row = {
    "steps": 3, "tokens": 3200, "edits": {"atlas": 2, "gpt2-small": 2}, "batch": 4, "batches": 1, "few": 1, "widths": [256], "dense": 1,
    "earlier": 40, "solves": 3, "curve_width": 64, "curve": 80, "whole": 8, "blocks": 4,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="for instance a,c; default: all")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["atlas", "gpt2-small"], help="of a and b")
    parser.add_argument("--method", choices=METHODS, default="memit", help="of a and b; alphaedit's published solves take longer")
    parser.add_argument("--steps", type=int, help="of the value; default: the method's, 20 for GPT-2 small's shape")
    parser.add_argument("--tokens", type=int, default=10_240, help="for second moments; they do not change the time of an edit")
    parser.add_argument("--atlas-edits", type=int, default=20)
    parser.add_argument("--gpt2-edits", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="facts in a batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--few", type=int, default=4, help="facts of a batch that the plain way is timed on")
    parser.add_argument("--widths", type=int, nargs="+", default=[6400, 14336], metavar="D_IN")
    parser.add_argument("--dense", type=int, default=3, help=f"dense solves up to d_in {WIDEST_IN_DOUBLE}; one beyond")
    parser.add_argument("--earlier", type=int, default=1000, help="remembered keys before the solves are timed")
    parser.add_argument("--solves", type=int, default=64, help="mean over so many")
    parser.add_argument("--curve", type=int, default=3000, help="keys")
    parser.add_argument("--curve-width", type=int, default=2048, metavar="D_IN")
    parser.add_argument("--whole", type=int, default=300, help="whole edits")
    parser.add_argument("--curve-methods", type=lambda text: text.split(","), default=["alphaedit", "deltaedit"])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--probe", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        json.dump(probe(args.probe), sys.stdout)
        return
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    args.edits = {"atlas": args.atlas_edits, "gpt2-small": args.gpt2_edits}
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(args.threads)
    result: Row = {"machine": machine(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ERRATA_CACHE"] = cache  # statistics of random weights are of no use to anybody later
        for part in args.parts:
            say(f"part {part}")
            result[part] = PARTS[part](args)
    result["machine"]["load at the end"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
