"""`errata edit --explain`: a strip of the answer's tokens for each step of the edit, and what each token came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.table import Table
from rich.text import Text

from errata.cli import show
from errata.edits import Edit
from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from errata.methods import Session
from errata.metrics.overfitting import Lens

OVER, UNDER = "O", "u"
STYLES = {OVER: "white on red", UNDER: "black on bright_cyan"}
"""The letter says it where there is no colour: O over-fitted (UD < 0), u not."""


def lens(lm: LanguageModel, session: Session, facts: Sequence[Fact], rephrasings: Sequence[str]) -> Lens:
    """A lens on the session's next edit."""
    made = Lens(
        lm,
        EditCase("edit", tuple(facts), tuple(Probe(prompt, (facts[0].target,)) for prompt in rephrasings)),
        strips=("reliability", "generality"),
    )
    session.watch = made
    return made


def data(lens: Lens, edit: Edit) -> dict[str, Any]:
    """What was seen, JSON-ready: `watched` says whether step by step; else (an editor without steps) before and after alone.

    strips: one for each edit prompt and rephrasing: prompt, answer, tokens, own (see `Strip`), loss and ud [steps + 1][tokens].
    """
    watched = lens.curves() is not None
    if not watched:
        lens(0, nullcontext())
        lens(1, edit.applied_())
    curves = lens.curves()
    assert curves is not None
    strips = [
        {**record, "ud": [[float(f"{value:.4g}") for value in row] for row in strip.ud]}
        for record, strip in zip(curves.to_dict()["strips"], curves.strips, strict=True)
    ]
    return {"watched": watched, "steps": curves.steps if watched else None, "strips": strips}


def tell(told: Mapping[str, Any]) -> None:
    """Print it: for each answer a strip a step, and a table of its tokens."""
    for strip in told["strips"]:
        what = "rephrased" if strip["kind"] == "generality" else "the edit"
        show._print(Text(f"\n{what}: {strip['prompt']} → {strip['answer']}", style="bold"))
        marks = _chosen(len(strip["loss"]) - 1)
        names = {step: f"step {step}" for step in marks} if told["watched"] else {0: "before", 1: "after"}
        for step, name in names.items():
            line = Text(f"{name:>8}  ")
            for token, loss, ud in zip(strip["tokens"], strip["loss"][step], strip["ud"][step], strict=True):
                letter = OVER if ud < 0 else UNDER
                line.append(f" {_shown(token)} {letter}{_number(loss)} ", style=STYLES[letter])
                line.append(" ")
            show._print(line)
        drawn = Table("token", box=None, pad_edge=False)
        for heading in ("loss before", "after", "its own", "UD"):
            drawn.add_column(heading, justify="right")
        drawn.add_column("")
        for i, token in enumerate(strip["tokens"]):
            ud = strip["ud"][-1][i]
            cells = [_number(strip["loss"][0][i]), _number(strip["loss"][-1][i]), _number(-strip["own"][i]), f"{ud:+.2g}"]
            verdict = Text("over-fitted" if ud < 0 else "not over-fitted", style="red" if ud < 0 else "cyan")
            drawn.add_row(Text(_shown(token)), *cells, verdict)
        show._print(drawn)
    show._print(
        Text(
            f"\nBehind each token: {OVER} over-fitted, {UNDER} not, and its loss −log p. 'its own': the loss of what the unedited model "
            "writes there by itself. UD = loss after − its own; below 0 the edit is surer of its token than the model was of its own.",
            style="dim",
        )
    )


def _chosen(last: int) -> list[int]:
    """0, 1, 2, 4, 8 … and the last step: most happens at the beginning."""
    return sorted({0, *(2**i for i in range(last.bit_length()) if 2**i < last), last})


def _shown(token: str) -> str:
    """A token's text, with what one does not see."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _number(loss: float) -> str:
    """Two decimals; less than that as a power of ten."""
    return f"{loss:.2f}" if loss >= 0.005 or loss == 0 else f"{loss:.0e}".replace("e-0", "e-")
