"""`errata edit`: requests into a ledger."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.bench.plan import PlanError, check_owners, parse_settings
from errata.cli import show
from errata.cli.app import DeviceOption, DtypeOption, Failed, JsonOption, ModelOption, SetOption, ThreadsOption, _load, _threads, app
from errata.facts import Fact, check_text

if TYPE_CHECKING:
    from errata.corrections import Outcome
    from errata.edits.ledger import Ledger
    from errata.lm import LanguageModel

SHOWN = 24
"""So many facts are shown with what the model says before and after."""
ANSWER = 16
"""Tokens of what it says."""


@app.command()
def edit(
    model: ModelOption,
    out: Annotated[Path, typer.Option(metavar="EDITS", help="The ledger: a new folder, or one that goes on.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="See 'errata list methods'.")] = "ft-m",
    objective: Annotated[str, typer.Option(metavar="NAME", help="See 'errata list objectives'.")] = "ce",
    fact: Annotated[
        list[str] | None, typer.Option(metavar="FACT", help="'The capital of {France} is -> Lyon'; several are allowed.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(metavar="F.jsonl", help="One JSON object a line: prompt, subject, target; rephrasings, locality (lists of prompts)."),
    ] = None,
    setting: SetOption = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many facts become one edit (default: 1; all of them for editors of sets).")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(metavar="LIMITS.yaml", help="What an edit must not break (default: built-in limits).")
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Keep every edit, whatever it breaks.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Edit also what the model says already, or what was turned down before.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Undo the edit that says otherwise about the same prompt.")] = False,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="Kept with the edits: who asked for them, or why.")] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Show step by step how each token was fitted, and over-fitted.")] = False,
    rephrase: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="For one fact: must be answered alike; with --explain it is shown too.")
    ] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Every random number comes from it.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct facts and keep it in a ledger; the model itself is not written. Stopped at any moment, the same command goes on."""
    from errata.corrections.requests import REPHRASINGS, read_requests, request
    from errata.edits.rows import LOCALITY

    check_text(note or "", *(rephrase or ()))
    wanted = [Fact.parse(line) for line in fact or ()]
    if rephrase and (len(wanted) != 1 or facts):
        raise PlanError("--rephrase belongs to one --fact; in a file, give each fact its own list of 'rephrasings'")
    cases = [request(number, one, {REPHRASINGS: rephrase or [], LOCALITY: []}) for number, one in enumerate(wanted)]
    cases += [request(len(wanted) + i, *_parts(case)) for i, case in enumerate(read_requests(facts))] if facts else []
    if not cases:
        raise PlanError("nothing to edit; give --fact 'The capital of {France} is -> Lyon' or --facts F.jsonl")
    if gate and no_gate:
        raise PlanError("--gate and --no-gate contradict each other; give one")
    settings = parse_settings(setting or ())
    check_owners(settings, [method], [objective])
    _threads(threads)
    from errata.bench.run import parts
    from errata.cli import explain
    from errata.corrections import Limits, correct
    from errata.edits.ledger import Ledger, check_place, is_ledger

    editor, loss = parts(method, objective, settings)
    size = batch or (len(cases) if editor.for_sets else 1)
    if explained and size < len(cases):
        raise PlanError("--explain shows one edit; give one fact, or --batch")
    limits = None if no_gate else Limits.read(gate)
    begun = is_ledger(out)
    ledger = Ledger.write(out) if begun else None  # before anything heavy is loaded: another may be writing
    try:
        if ledger is None:
            check_place(out)
        _writable(out)
        lm = _load(model, device, dtype or (ledger.base.dtype if ledger else None))
        if ledger is None:
            editor.start(lm, objective=loss, seed=seed)  # what cannot edit this model says so before anything is written
            ledger = Ledger.write(out, lm)
        ledger.check_base(lm)
        shown = [item for case in cases for item in case.facts if _short(lm, item)][:SHOWN]
        before = _answers(ledger, lm, shown)
        lenses: list[Any] = []

        def look(session: Any) -> None:
            lenses.append(explain.lens(lm, session, [item for case in cases for item in case.facts], rephrase or ()))

        with show.progress("editing") as report:
            outcomes = correct(
                lm, ledger, cases, editor, loss, seed, size, limits, force, replace, note, report, look if explained else None
            )  # fmt: skip
        after = _answers(ledger, lm, shown)
        rows = [
            {"fact": str(item), "prompt": item.text, "before": old, "after": new}
            for item, old, new in zip(shown, before, after, strict=True)
        ]
        told = None
        if lenses and (number := outcomes[0].number):
            told = explain.data(lenses[-1], ledger.edit(ledger.entry(number), lm))
        _report(ledger, outcomes, rows, told, as_json, model)
    finally:
        if ledger is not None:
            ledger.close()


def _writable(out: Path) -> None:
    """Raise PermissionError where nothing may be written: before minutes of loading, not after."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "nothing may be written here", str(there))


def _report(
    ledger: Ledger, outcomes: list[Outcome], rows: list[dict[str, str]], told: dict[str, Any] | None, as_json: bool, model: str
) -> None:
    from errata.cli import explain
    from errata.corrections.run import MADE, REJECTED, SKIPPED

    counts = {status: sum(one.status == status for one in outcomes) for status in (MADE, SKIPPED, REJECTED)}
    out, numbers = ledger.folder, [one.number for one in outcomes if one.status == MADE and one.number]
    if as_json:
        entries = [ledger.entry(number) for number in dict.fromkeys(numbers)]
        summary = {"edits": str(out), "counts": counts, "checksum": ledger.checksum, "outcomes": [one.to_dict() for one in outcomes]}
        last = {"method": entries[-1].method, "objective": entries[-1].objective, "diagnostics": entries[-1].diagnostics} if entries else {}
        metrics = {"metrics": entries[-1].metrics} if entries else {}
        show.json_out(summary | last | metrics | {"facts": rows} | ({"explain": told} if told else {}))
    else:
        show.before_and_after(rows)
        if told:
            explain.tell(told)
        show.note(", ".join(f"{count} {status}" for status, count in counts.items() if count) + f" of {len(outcomes)}")
        for one in outcomes:
            if one.reason:
                show.note(f"  {one.status}: {'; '.join(map(str, one.case.facts))}: {one.reason}")
        answers = {row["fact"]: row["after"] for row in rows}
        for one in outcomes:
            for item in one.case.facts:
                said = answers.get(str(item))
                if one.status == MADE and not one.reason and said is not None and not said.strip().startswith(item.target):
                    show.note(
                        f"by itself the edited model does not answer {item.target!r} to {item.text!r}: this edit did not take, or a later "
                        "one changed it"
                    )
        if numbers:
            show.note(f'kept in {out}; see it again with: errata log {out}, errata ask --model {model} --edits {out} "…"')
    if counts[REJECTED]:
        raise Failed(f"{counts[REJECTED]} of {len(outcomes)} requests rejected; errata log {out} --rejected says why")


def _answers(ledger: Ledger, lm: LanguageModel, facts: list[Fact]) -> list[str]:
    """What the model says to each, as the ledger has it."""
    from errata.edits import Stack

    try:
        ledger.apply(lm)
        return lm.generate([item.text for item in facts], ANSWER, stop_at_newline=False)
    finally:
        Stack.of(lm).clear()


def _short(lm: LanguageModel, fact: Fact) -> bool:
    """Whether the model can read its prompt and answer; if not, the request is rejected, and need not be shown."""
    from errata.lm import ModelError, encode

    try:
        lm.check_length(len(encode(lm.tokenizer, fact.text).ids) + ANSWER)
    except ModelError:
        return False
    return True


def _parts(case: Any) -> tuple[Fact, dict[str, Any]]:
    """A request that was read, to be numbered anew."""
    return case.facts[0], {"rephrasings": [probe.prompt for probe in case.rephrases], "locality": list(case.meta["locality"])}
