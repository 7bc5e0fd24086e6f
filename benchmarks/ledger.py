"""What it costs to keep corrections, to take one back, and to ship them, in one run with the obvious way of doing the same.

    python benchmarks/ledger.py                       everything: about half an hour on two cores, 4 GB of memory and of disk
    python benchmarks/ledger.py --parts undo,size     three minutes
    python benchmarks/ledger.py --quick               every part on toys, to see that it runs

undo    one edit of a thousand on atlas, in the ledger and in the live model, beside the model loaded anew and all others put in again
size    a ledger of 3,000 DeltaEdit edits at the widths of GPT2-XL (five layers, float32): bytes, and seconds until it answers
export  50 facts of atlas, each with DeltaEdit, LoRA and FT-M, shipped in three forms and read again without errata (served.py)
gate    seconds an edit with the battery before and after it, and without

The edits of `undo` and `size` have the shapes of real ones and random numbers: what they cost does not depend on what they say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from objective import machine
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import errata
from errata.corrections import Limits, correct
from errata.data import load as load_data
from errata.edits import Edit, LowRankDelta, Stack
from errata.edits.edit import Trail
from errata.edits.export import FORMATS, export
from errata.edits.ledger import Ledger, New
from errata.facts import EditCase, Fact
from errata.lm.model import LanguageModel
from errata.methods import get as get_method

PARTS = ("undo", "size", "export", "gate")
METHODS = ("deltaedit", "lora", "ft-m")
SERVED = Path(__file__).parent / "served.py"
Row = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(run: Callable[..., Any], *given: Any, **named: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run(*given, **named)
    return time.perf_counter() - start, result


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def random_edits(lm: LanguageModel, shapes: dict[str, tuple[int, int]], count: int) -> Iterator[Edit]:
    """Rank-one edits of those modules [out, in], each of a fact of its own, with the number that DeltaEdit keeps of each matrix."""
    draw = torch.Generator().manual_seed(0)
    record = get_method("deltaedit").to_dict()
    for number in range(count):
        deltas = [
            LowRankDelta(path, torch.randn(out, 1, generator=draw) / 100, torch.randn(1, width, generator=draw) / 100)
            for path, (out, width) in shapes.items()
        ]
        trail = Trail(f"{number:016}", {f"factor.{place}": torch.rand(1, 1, generator=draw).double() for place in range(len(shapes))})
        yield Edit(lm, deltas, [Fact("The number of {} is", f"Thing {number}", str(number))], record, None, {}, trail=trail)


def fill(folder: Path, lm: LanguageModel, shapes: dict[str, tuple[int, int]], count: int) -> float:
    """Seconds an edit, each on the disk before the next."""
    with Ledger.write(folder, lm) as ledger:
        seconds, _ = timed(lambda: [ledger.add(New(edit)) for edit in random_edits(lm, shapes, count)])
    return seconds / count


def undo(place: Path, args: argparse.Namespace) -> Row:
    """Medians over edits from everywhere in the sequence."""
    count, folder = args.undo_edits, place / "L"
    lm = errata.load("atlas", device="cpu")
    made = correct_one(lm)
    fill(folder, lm, {delta.path: delta.stored_shape(False) for delta in made.deltas}, count)
    chosen = [1, count // 4, count // 2, 3 * count // 4, count]
    alone, live, again, process = [], [], [], []
    with Ledger.write(folder) as ledger:
        edits = ledger.apply(lm)
        before = checksum(lm)
        for number in chosen:
            alone.append(timed(ledger.undo, number)[0])
            live.append(timed(edits[number - 1].revert)[0])
            whole = checksum(lm)
            Stack.of(lm).clear()
            again.append(timed(anew, folder, whole)[0])
            ledger.redo(number)
            edits = ledger.apply(lm)
            assert checksum(lm) == before
    for number in chosen[:3]:
        command = [sys.executable, "-m", "errata", "undo", str(folder), str(number)]
        process.append(timed(subprocess.run, command, check=True, capture_output=True)[0])
    return {
        "edits": count,
        "layers": len(made.deltas),
        "in the ledger": statistics.median(alone),
        "in the live model": statistics.median(live),
        "the command, whole": statistics.median(process),
        "baseline: all anew": statistics.median(again),
    }


def correct_one(lm: LanguageModel) -> Edit:
    return get_method("deltaedit").start(lm).complete([load_data("atlas", split="dev")[0].facts[0]])


def anew(folder: Path, expected: str) -> None:
    """What undoing is where no edit can be taken out: the model from the disk, and everything else written into it again."""
    lm = errata.load("atlas", device="cpu")
    with Ledger.open(folder) as ledger:
        ledger.apply(lm)
    assert checksum(lm) == expected, "undone in the live model, the weights must be those without the edit"


def checksum(lm: LanguageModel) -> str:
    return errata.LanguageModel(lm.model, lm.tokenizer).fingerprint


def ledger_size(place: Path, args: argparse.Namespace) -> Row:
    width, count = (64, 20) if args.quick else (1600, 3000)
    torch.manual_seed(0)
    atlas = errata.load("atlas", device="cpu")
    model = GPT2LMHeadModel(GPT2Config(n_layer=5, n_embd=width, n_head=16, vocab_size=4000, bos_token_id=0, eos_token_id=0)).eval()
    lm = errata.LanguageModel(model, atlas.tokenizer)
    shapes = {f"transformer.h.{layer}.mlp.c_proj": (width, 4 * width) for layer in range(5)}
    each = fill(place / "L", lm, shapes, count)
    before = psutil.Process().memory_info().rss
    with Ledger.open(place / "L") as ledger:
        read, edits = timed(ledger.edits, lm)
        written, _ = timed(Stack.of(lm).apply, *edits)
        after = psutil.Process().memory_info().rss
        first, _ = timed(edits[count // 2].revert)
        Stack.of(lm).clear()
        verified, problems = timed(ledger.verify, lm)
    assert not problems
    factors = sum(4 * (out + across) for out, across in shapes.values()) * count
    return {
        "edits": count,
        "MB": size(place / "L") / 1e6,
        "of these factors": factors / 1e6,
        "keys, which are not kept": sum(4 * across for _, across in shapes.values()) * count / 1e6,
        "baseline: one checkpoint an edit, GB": count * sum(p.numel() for p in model.parameters()) * 4 / 1e9,
        "s to enter one": each,
        "s to read": read,
        "s to apply": written,
        "s to undo one": first,
        "s to verify": verified,
        "MB of memory": (after - before) / 1e6,
    }


def shipped(place: Path, args: argparse.Namespace) -> list[Row]:
    """Each export's logits, at all positions of all facts' prompts with their answers and of their locality prompts."""
    rows = []
    cases = load_data("atlas", split="dev")[: args.facts]
    for dtype in ("float64", "bfloat16"):
        base = place / dtype
        stored(base, dtype)
        for name in METHODS:
            lm = errata.load(base, device="cpu")
            folder = place / f"{dtype}-{name}"
            with Ledger.write(folder / "L", lm) as ledger:
                seconds, outcomes = timed(correct, lm, ledger, cases, get_method(name))
                edits = ledger.edits(lm)
            prompts = [f"{case.facts[0].text} {case.facts[0].target}" for case in cases]
            prompts += [probe.prompt for case in cases for probes in case.locality.values() for probe in probes]
            ids = [list(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in dict.fromkeys(prompts)]
            (folder / "ids.json").write_text(json.dumps(ids))
            Stack.of(lm).apply(*edits)
            ours = logits(lm, ids)
            Stack.of(lm).clear()
            plain = logits(lm, ids)
            for form in FORMATS:
                took, done = timed(export, edits, form, folder / form)
                command = [sys.executable, str(SERVED), str(base), str(folder / form), str(folder / "ids.json"), str(folder / "out")]
                subprocess.run(command, check=True, capture_output=True)
                theirs = [tensor.double() for _, tensor in sorted(load_file(folder / "out").items(), key=lambda item: int(item[0]))]
                tops = [float((a.argmax(-1) == b.argmax(-1)).double().mean()) for a, b in zip(ours, theirs, strict=True)]
                rows.append({
                    "dtype": dtype, "method": name, "made": sum(one.status == "made" for one in outcomes), "form": form, "rank": done.rank,
                    "residual": max(done.residual.values(), default=0.0), "MB": size(folder / form) / 1e6, "s": took,
                    "moved": max(gap(ours, plain)), "difference": max(gap(ours, theirs)), "rms": statistics.fmean(rms(ours, theirs)),
                    "same top": statistics.fmean(tops), "s/edit": seconds / len(cases),
                })  # fmt: skip
                say(f"{dtype} {name} {form}: {rows[-1]['difference']:.1e}")
            shutil.rmtree(folder)
    return rows


def stored(base: Path, dtype: str) -> None:
    """Atlas as a folder in another dtype, with what lies beside its weights."""
    home = Path(errata.__file__).parent / "data" / "atlas" / "model"
    shutil.copytree(home, base)
    lm = errata.load("atlas", dtype=dtype, device="cpu")
    lm.model.save_pretrained(base)


def logits(lm: LanguageModel, ids: Sequence[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [lm.model(torch.tensor([row])).logits[0].double() for row in ids]


def gap(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[float]:
    return [float((x - y).abs().max()) for x, y in zip(a, b, strict=True)]


def rms(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[float]:
    return [float((x - y).square().mean().sqrt()) for x, y in zip(a, b, strict=True)]


def gate(place: Path, args: argparse.Namespace) -> list[Row]:
    """The same facts both ways, each on its own ledger."""
    cases = [EditCase(case.id, case.facts, case.rephrases) for case in load_data("atlas", split="dev")[: args.gate_facts]]
    lm, rows = errata.load("atlas", device="cpu"), []
    for name in METHODS:
        method, found = get_method(name), {}
        for way, limits in (("without", None), ("with", Limits.read())):
            with Ledger.write(place / f"{name}-{way}", lm) as ledger:
                correct(lm, ledger, cases[:1], method, limits=limits)  # warm
                seconds, outcomes = timed(correct, lm, ledger, cases[1:], method, limits=limits)
            found[way] = seconds / len(outcomes)
            found[f"made {way}"] = sum(one.status == "made" for one in outcomes)
        rows.append({"method": name, "facts": len(cases) - 1, **found})
        say(f"gate {name}")
    return rows


def show(result: dict[str, Any]) -> None:
    where = result["machine"]
    print(f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, load {where['load']:.1f}; torch {where['torch']}")
    for part in PARTS:
        rows = result.get(part)
        if rows is None:
            continue
        print(f"\n{part}")
        for row in [rows] if isinstance(rows, dict) else rows:
            print("  " + "  ".join(f"{name} {_short(value)}" for name, value in row.items()))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--undo-edits", type=int, default=1000)
    parser.add_argument("--facts", type=int, default=50, help="of `export`")
    parser.add_argument("--gate-facts", type=int, default=31)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(undo_edits=12, facts=2, gate_facts=2)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    run: dict[str, Callable[[Path, argparse.Namespace], Any]] = {"undo": undo, "size": ledger_size, "export": shipped, "gate": gate}
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="ledger-") as place:
            result[part] = run[part](Path(place), args)
        say(part)
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
