"""`errata demo`: one fact corrected four ways in the bundled model, and what each of them moved besides."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import errata
from errata.bench.plan import Plan
from errata.bench.run import parts
from errata.bench.run import run as run_plan
from errata.cli import show
from errata.data.atlas.world import build
from errata.edits import Edit
from errata.facts import Fact
from errata.lm import LanguageModel
from errata.lm.tokens import encode
from errata.metrics.normalise import exact

ROWS = [(method, objective) for method in ("ft-m", "lora") for objective in ("ce", "overtone")]
# The rate and steps of the OVERTONE paper, where over-fitting shows; the bundled model's own defaults are gentler.
SETTINGS = {"lora": {"lr": 5e-3, "steps": 70}}
FACT = Fact("The capital of {} is", "France", "Vienna", "Paris")
SCORED = 12  # cases in the table of scores: enough to see it, few enough for a minute


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, why, and whether the answer should have changed."""

    why: str
    prompt: str
    wanted: str


def questions() -> list[Question]:
    """What follows from the new fact, and what does not, in the bundled world."""
    world = build()
    born = world.by_object["birth_country", "France"]
    new = FACT.target
    return [
        Question("the edit", FACT.text, new),
        Question("in other words", "Q: Which city is the capital of France? A:", new),
        Question("by another name", f"The capital of {world.entities['France'].alias} is", new),
        Question("one step further", f"The capital of the country where {born[0]} was born is", new),
        Question("same subject", "The currency of France is the", "euro"),
        Question("same subject", "The official language of France is", "French"),
        Question("other subject", "The capital of Germany is", "Berlin"),
        Question("other subject", "The capital of Japan is", "Tokyo"),
        Question("far away", f"{born[0]} works as a", world.object_of(born[0], "profession")),
    ]


def run(as_json: bool = False) -> None:
    """Tell the story; with `as_json` only its numbers."""
    start = time.perf_counter()
    lm = errata.load("atlas")
    asked = questions()
    prompts = [question.prompt for question in asked]
    said = {"before": answers(lm, prompts)}
    pushed = {}
    for method, objective in ROWS:
        editor, loss = parts(method, objective, SETTINGS)
        edit = errata.edit(lm, FACT, editor, loss)
        with edit.applied_():
            said[f"{method} {objective}"] = answers(lm, prompts)
            pushed[f"{method} {objective}"] = {"p": probability(lm), "steps": edit.diagnostics["steps"], "size": size(edit)}
    with tempfile.TemporaryDirectory() as folder, show.progress("measuring") as report:
        plan = Plan("atlas", "atlas", ("ft-m", "lora"), ("ce", "overtone"), limit=SCORED, split="dev", settings=SETTINGS)
        results = run_plan(plan, Path(folder) / "run", load=lambda: lm, progress=report)
    seconds = time.perf_counter() - start
    if as_json:
        rows = [{"why": q.why, "prompt": q.prompt, "wanted": q.wanted, **{k: v[i] for k, v in said.items()}} for i, q in enumerate(asked)]
        show.json_out({"fact": str(FACT), "answers": rows, "edits": pushed, "scores": results["rows"], "seconds": round(seconds, 1)})
        return
    _tell(asked, said, pushed, results, seconds)


def answers(lm: LanguageModel, prompts: list[str]) -> list[str]:
    """What the model writes, up to the end of the line, without the full stop."""
    return [text.strip().rstrip(".") for text in lm.generate(prompts, max_new_tokens=12)]


def probability(lm: LanguageModel) -> float:
    """p(target | prompt), the product over its tokens."""
    batch = lm.batch([encode(lm.tokenizer, FACT.text, FACT.target)])
    with torch.no_grad():
        picked = torch.log_softmax(lm.target_logits(batch).float(), -1).gather(-1, batch.targets.unsqueeze(-1))
    return float(picked.sum().exp())


def size(edit: Edit) -> float:
    """Frobenius norm of everything the edit adds to the weights."""
    squares = 0.0
    for delta in edit.deltas:
        parts = delta.tensors()
        dense = parts["tensor"] if "tensor" in parts else parts["left"] @ parts["right"]
        squares += float(dense.double().square().sum())
    return math.sqrt(squares)


def _tell(asked: list[Question], said: dict[str, list[str]], pushed: dict[str, Any], results: dict[str, Any], seconds: float) -> None:
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    console.print(Text(f"\nThe fact:  {FACT}\n", style="bold"))
    drawn = Table(box=None, pad_edge=False)
    for heading in ("asked", "", "should be"):
        drawn.add_column(heading)
    for heading in said:
        drawn.add_column(heading, max_width=18, no_wrap=True, overflow="ellipsis")
    for i, question in enumerate(asked):
        cells = [_mark(said[name][i], None if name == "before" else question.wanted) for name in said]
        drawn.add_row(Text(question.prompt), Text(question.why, style="dim"), question.wanted, *cells)
    drawn.add_section()
    for what, key, form in (("p(target)", "p", ".3f"), ("steps", "steps", "d"), ("size of the change", "size", ".2f")):
        drawn.add_row(what, "", "", "", *(format(pushed[name][key], form) for name in said if name != "before"), style="dim")
    console.print(drawn)
    console.print(Text(f"\n{SCORED} other facts, each corrected alone in the unedited model:", style="bold"))
    show.table(results)
    score = {(row["method"], row["objective"]): row["metrics"] for row in results["rows"]}
    plain, smooth = score["lora", "ce"], score["lora", "overtone"]
    console.print(
        Text(
            "\nWhy OVERTONE: cross-entropy (ce) goes on pushing every target token towards probability 1 when the model gives the\n"
            "right answer long since, and the surplus is paid by what it knew besides. OVERTONE mixes into each token's target\n"
            "what the model itself believes, and stops each token as soon as it is close enough. Here, for LoRA at the paper's\n"
            f"rate: locality {plain['locality']:.0f} -> {smooth['locality']:.0f}, generation {plain['generation']:.0f} -> "
            f"{smooth['generation']:.0f}.   ({seconds:.0f} s)"
        )
    )
    show.note(f'next:  errata edit --model atlas --method lora --objective overtone --fact "{FACT}" --out vienna')


def _mark(answer: str, wanted: str | None) -> Text:
    """An answer, with a tick or a cross (and colour) where something was wanted."""
    if wanted is None:
        return Text(answer)
    right = exact(answer, [wanted])
    return Text(f"{'✓' if right else '✗'} {answer}", style="green" if right else "red")
