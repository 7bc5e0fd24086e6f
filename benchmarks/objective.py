"""What OVERTONE costs beside cross-entropy: forward + backward from the logits, time and peak memory, and its share of a training step.

    python benchmarks/objective.py                      a minute or two on one core
    python benchmarks/objective.py --vocab 128000 --repeats 3 --json

The training step is that of one edit method that trains a single matrix (FT-M) in a decoder of GPT-2 small's size with random weights:
the whole forward pass, the head at the target positions only, and the backward pass down to one MLP projection. It is small on purpose:
in a larger model the share of the objective is smaller still.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from errata.objectives import CrossEntropy, Objective, Overtone

OBJECTIVES: dict[str, Objective] = {"ce": CrossEntropy("sum"), "overtone": Overtone(), "overtone static": Overtone(dynamic=False)}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each, taken in turns so that a busy moment of the machine does not hit one of them alone."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that is allocated at one time beyond what was before: exact, from the allocator, not from the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure_objectives(v: int, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of forward + backward from given logits [B, T, v]."""
    logits = (3 * torch.randn(args.edits, args.tokens, v, device=device)).to(args.dtype).requires_grad_()
    targets = torch.randint(v, logits.shape[:2], device=device)
    mask, reference = torch.ones_like(targets, dtype=torch.bool), logits.detach()

    def run(objective: Objective) -> Callable[[], None]:
        def forward_backward() -> None:
            torch.autograd.grad(objective(logits, targets, mask, reference).sum(), logits)

        return forward_backward

    runs = {name: run(objective) for name, objective in OBJECTIVES.items()}
    times = seconds(runs, args.repeats, device)
    return {name: {"seconds": times[name], "peak_bytes": peak_bytes(runs[name], device)} for name in runs}


class Decoder(nn.Module):
    """A causal transformer with an output head that sees the target positions only."""

    def __init__(self, v: int, layers: int, width: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True)
        self.embed = nn.Embedding(v, width)
        self.body = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, v, bias=False)

    def forward(self, ids: Tensor, tokens: int) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device, self.head.weight.dtype)
        logits: Tensor = self.head(self.body(self.embed(ids), mask=causal, is_causal=True)[:, -tokens:])
        return logits


def measure_step(v: int, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a whole training step with cross-entropy and with OVERTONE."""
    model = Decoder(v, args.layers, args.width).to(device, args.dtype).requires_grad_(False)
    weight = model.body.layers[args.layers * 2 // 3].linear2.weight.requires_grad_()  # FT-M's layer 21 of 32
    optimiser = torch.optim.Adam([weight], lr=1e-5)
    ids = torch.randint(v, (args.edits, args.prompt + args.tokens), device=device)
    targets = torch.randint(v, (args.edits, args.tokens), device=device)
    mask = torch.ones_like(targets, dtype=torch.bool)

    def run(objective: Objective) -> Callable[[], None]:
        def step() -> None:
            optimiser.zero_grad()
            objective(model(ids, args.tokens), targets, mask).sum().backward()
            optimiser.step()

        return step

    return seconds({name: run(OBJECTIVES[name]) for name in ("ce", "overtone")}, args.repeats, device)


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from, and how busy it was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 64_000, 128_000], metavar="V", help="the step takes the largest")
    parser.add_argument("--edits", type=int, default=8, help="B")
    parser.add_argument("--tokens", type=int, default=4, help="T, target tokens of an edit")
    parser.add_argument("--prompt", type=int, default=20, help="tokens before the target")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="float32, bfloat16, …")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    sizes = {v: measure_objectives(v, args, args.device) for v in sorted(args.vocab)}
    largest = max(sizes)
    step = measure_step(largest, args, args.device)
    extra = sizes[largest]["overtone"]["seconds"] - sizes[largest]["ce"]["seconds"]
    result = {
        "machine": machine(args.device),
        "setting": {"edits": args.edits, "tokens": args.tokens, "prompt": args.prompt, "layers": args.layers, "width": args.width}
        | {"dtype": str(args.dtype), "repeats": args.repeats},
        "objectives": {str(v): row for v, row in sizes.items()},
        "step": {"vocab": largest, "seconds": step, "extra_seconds": extra, "extra_percent": 100 * extra / step["ce"]},
    }
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    print(" · ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"forward + backward of {args.edits} edits × {args.tokens} tokens, {args.dtype}; peak beyond the logits, in logits")
    print(f"{'V':>8}  " + "".join(f"{name:>32}" for name in OBJECTIVES))
    for v, row in sizes.items():
        entries = args.edits * args.tokens * v
        size = entries * args.dtype.itemsize
        cells = [
            f"{1e3 * r['seconds']:.2f} ms ({1e9 * r['seconds'] / entries:.2f} ns/entry) {r['peak_bytes'] / size:.2f}" for r in row.values()
        ]
        print(f"{v:>8}  " + "".join(f"{cell:>32}" for cell in cells))
    print(f"training step at V = {largest}: {step['ce']:.3f} s with ce, {step['overtone']:.3f} s with overtone")
    print(f"overtone costs {1e3 * extra:.2f} ms more than ce, {result['step']['extra_percent']:.2f} % of the step")


if __name__ == "__main__":
    main()
