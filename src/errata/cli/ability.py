"""`errata eval --ability`: what the model can do beside the edited facts, before the edits and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.plan import PlanError, did_you_mean
from errata.cli import show

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.lm import LanguageModel

PERPLEXITY = "perplexity"
"""Stands among the tasks: on the text beside the model's weights, or, without one, the gate's sentences."""


def asked(tasks: str | None, variant: str, data_dir: Path | None, limit: int | None) -> list[str]:
    """The tasks by name, the six and perplexity where none is named; what is wrong with them is said before a model is loaded."""
    from errata.metrics import ability

    if variant not in ability.VARIANTS:
        raise PlanError(f"unknown variant {variant!r}{did_you_mean(variant, ability.VARIANTS)}")
    names = [*ability.TASKS, PERPLEXITY] if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise PlanError(f"--tasks names none; there is {', '.join(ability.TASKS)}, {PERPLEXITY}")
    ability.check([name for name in names if name != PERPLEXITY], data_dir, limit)
    return names


def run(
    lm: LanguageModel, edit: Edit | None, tasks: Sequence[str], variant: str, limit: int | None, data_dir: Path | None
) -> dict[str, Any]:
    """{"before": task -> scores}, and with an edit "after" and "difference" too."""
    from errata.bench.also import of_held_out
    from errata.metrics import ability

    states: list[tuple[str, AbstractContextManager[object]]] = [("before", nullcontext()), *([("after", edit.applied_())] if edit else [])]
    found: dict[str, Any] = {"variant": variant, "limit": limit}
    for when, state in states:
        show.note(f"measuring {'the unedited model' if when == 'before' else 'the edited model'}")
        with state:
            found[when] = ability.measure(lm, [name for name in tasks if name != PERPLEXITY], variant, limit, data_dir)
            if PERPLEXITY in tasks:
                found[when][PERPLEXITY] = {PERPLEXITY: round(of_held_out(lm), 6)}
    if edit:
        found["difference"] = ability.difference(found["before"], found["after"])
    return found


def tell(found: dict[str, Any]) -> None:
    """One metric a line: before, after, difference."""
    whens = [when for when in ("before", "after") if when in found]
    drawn = show._with_columns(["task", "metric"], [*whens, *(["difference"] if len(whens) > 1 else []), "n"])
    for task, scores in found["before"].items():
        for name, value in scores.items():
            if name == "n":
                continue
            values = [value, *([found["after"][task][name]] if len(whens) > 1 else [])]
            cells = [f"{one:.2f}" for one in values] + ([f"{values[1] - values[0]:+.2f}"] if len(values) > 1 else [])
            drawn.add_row(task, name, *cells, f"{scores['n']:.0f}" if "n" in scores else "")
    show._print(drawn)
