"""`errata log | show | undo | redo | verify | diff`: the ledger from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.bench.plan import PlanError
from errata.cli import show as showing
from errata.cli.app import DeviceOption, Failed, JsonOption, ThreadsOption, _load, _threads, app

if TYPE_CHECKING:
    from errata.edits.ledger import Ledger
    from errata.edits.rows import Entry

EditsArgument = Annotated[Path, typer.Argument(metavar="EDITS", help="The ledger that 'errata edit --out' wrote.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An edit's number, or the beginning of its id.")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID…", help="Numbers of edits, or beginnings of their ids.")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="M", help="Default: the model that the ledger names.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Kept in the ledger.")]


@app.command()
def log(
    edits: EditsArgument,
    rejected: Annotated[bool, typer.Option("--rejected", help="What came to nothing, and why, in the place of the edits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The edits of a ledger, in their order."""
    with _open(edits) as ledger:
        if rejected:
            no = [one._asdict() | {"facts": [str(fact) for fact in one.facts]} for one in ledger.rejections()]
            if as_json:
                showing.json_out(no)
            else:
                showing.listing([{"at": one["at"], "fact": "; ".join(one["facts"]), "reason": one["reason"]} for one in no])
            return
        with ledger.snapshot():
            entries, base, checksum = ledger.entries(), ledger.base, ledger.checksum
        if as_json:
            told = [{k: v for k, v in entry.to_dict().items() if k not in ("diagnostics", "metrics")} for entry in entries]
            showing.json_out({"base": base._asdict(), "checksum": checksum, "edits": told})
            return
        drawn = showing._with_columns(["#", "id", "made (UTC)", "state", "method"], [])
        for heading in ("fact", "note"):  # they give way where the terminal is narrow; what an edit is found by does not
            drawn.add_column(heading, overflow="fold")
        for entry in entries:
            state = Text("active" if entry.active else "undone", style="" if entry.active else "dim")
            drawn.add_row(
                *(str(entry.number), entry.id, entry.made[:16].replace("T", " ")), state, _how(entry), _what(entry), entry.note or ""
            )
        showing._print(drawn)
        active = sum(entry.active for entry in entries)
        showing.note(f"{active} of {len(entries)} active, on {base.name} ({base.dtype}); weights {checksum[:12]}")


@app.command()
def show(edits: EditsArgument, id: IdArgument, as_json: JsonOption = False) -> None:
    """Everything about one edit."""
    with _open(edits) as ledger:
        entry = ledger.entry(id)
        history = [event._asdict() for event in ledger.events() if event.edit == entry.number]
        told = entry.to_dict() | {"built_on_it": ledger.built_on([entry.number]), "events": history}
    if as_json:
        showing.json_out(told)
        return
    for fact in entry.facts:
        typer.echo(str(fact))
    rows: dict[str, Any] = {name: told[name] for name in ("number", "id", "made", "note", "seed")}
    rows |= {"state": "active" if entry.active else "undone", "method": _settings(entry.method)}
    rows |= {"objective": _settings(entry.objective) if entry.objective else None, "matrices": ", ".join(dict.fromkeys(told["matrices"]))}
    rows |= {"memory": told["memory"], "made on top of": entry.parent, "later edits on top of it": ", ".join(map(str, told["built_on_it"]))}
    for when in ("before", "after"):
        if values := (entry.metrics or {}).get(when):
            rows[f"measured {when}"] = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    took = entry.diagnostics.get("seconds")
    rows |= {"steps": entry.diagnostics.get("steps"), "seconds": None if took is None else f"{took:.2f}"}
    told_rows = [{"name": name, "value": str(value)} for name, value in rows.items() if value not in (None, "")]
    for event in history:  # one may be undone and redone many times
        if event["action"] != "made" or event["reason"]:
            told_rows.append({"name": event["action"], "value": f"{event['at']}{': ' + event['reason'] if event['reason'] else ''}"})
    showing.listing(told_rows)


@app.command()
def undo(
    edits: EditsArgument,
    ids: IdsArgument,
    rebased: Annotated[bool, typer.Option("--rebase", help="Compute the edits anew that were computed on top of it.")] = False,
    gate: Annotated[
        Path | None,
        typer.Option(metavar="LIMITS.yaml", help="What an edit that is made again must not break (default: as when it was made)."),
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Keep every edit that is made again, whatever it breaks.")] = False,
    reason: ReasonOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take edits out, in any order: what stays is exactly what it would be had they never been applied."""
    if (gate or no_gate) and not rebased:
        raise PlanError("--gate and --no-gate are for what --rebase makes again; add --rebase, or leave them out")
    if gate and no_gate:
        raise PlanError("--gate and --no-gate contradict each other; give one")
    new: list[Entry] = []
    with _write(edits) as ledger:
        numbers = list(dict.fromkeys(ledger.entry(id).number for id in ids))
        later = ledger.built_on(numbers, through=rebased)
        if rebased:
            _threads(threads)
            from errata.corrections import Limits, rebase
            from errata.corrections.run import AS_MADE

            lm = _load(model or ledger.base.name, device, ledger.base.dtype)
            ledger.check_base(lm)
            with showing.progress("editing again") as report:
                new = rebase(lm, ledger, numbers, reason, report, None if no_gate else Limits.read(gate) if gate else AS_MADE)
        else:
            ledger.undo(*numbers, reason=reason)
        _changed(ledger, "undone", numbers, later, as_json, new)


@app.command()
def redo(edits: EditsArgument, ids: IdsArgument, reason: ReasonOption = None, as_json: JsonOption = False) -> None:
    """Put undone edits back into their places."""
    with _write(edits) as ledger:
        numbers = list(dict.fromkeys(ledger.entry(id).number for id in ids))
        ledger.redo(*numbers, reason=reason)
        _changed(ledger, "redone", numbers, [], as_json, [])


@app.command()
def verify(
    edits: EditsArgument,
    model: ModelOption = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Only the files: do not load the model to compare it.")] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find a flipped bit, a missing file, another base model."""
    from errata.edits.errors import LedgerDamaged

    count = 0
    try:
        with _open(edits) as ledger:
            problems = ledger.verify()
            if not problems and not no_model:
                problems = ledger.verify(_load(model or ledger.base.name, device, ledger.base.dtype))
            count = 0 if problems else len(ledger.entries())
    except LedgerDamaged as error:  # so much that it cannot even be opened
        problems = [str(error)]
    if as_json:
        showing.json_out({"edits": str(edits), "problems": problems})
    elif not problems:
        typer.echo(f"{edits}: {count} edit{'' if count == 1 else 's'}, all well")
    else:
        for problem in problems:
            typer.echo(problem)
    if problems:
        raise Failed(f"{edits} is damaged in {len(problems)} place{'s' if len(problems) > 1 else ''}; put it back from a backup")


@app.command()
def diff(edits: EditsArgument, a: IdArgument, b: IdArgument, as_json: JsonOption = False) -> None:
    """Two edits side by side: what they say, how they were made, and how alike their changes are, matrix by matrix."""
    from errata.edits.compare import compare

    with _open(edits) as ledger:
        one, other = ledger.entry(a), ledger.entry(b)
        told = compare(ledger, one, other)
    if as_json:
        showing.json_out(told)
        return
    drawn = showing._with_columns([""], [])
    for entry in (one, other):
        drawn.add_column(f"edit {entry.number}", overflow="fold")
    for name, (left, right) in told["settings"].items():
        drawn.add_row(name, str(left), str(right))
    showing._print(drawn)
    drawn = showing._with_columns(["matrix"], [f"‖Δ‖ of {one.number}", f"‖Δ‖ of {other.number}", "cosine"])
    for path, found in told["matrices"].items():
        drawn.add_row(path, *("–" if found[name] is None else f"{found[name]:.4g}" for name in ("a", "b", "cosine")))
    showing._print(drawn)


def _changed(ledger: Ledger, what: str, numbers: list[int], later: list[int], as_json: bool, new: list[Entry]) -> None:
    made = [entry.number for entry in new]
    if as_json:
        showing.json_out({"edits": str(ledger.folder), what: numbers, "built_on_them": later, "made": made, "checksum": ledger.checksum})
        return
    typer.echo(f"{what}: {', '.join(map(str, numbers))}; {len(ledger.entries(active=True))} active, weights {ledger.checksum[:12]}")
    if made:
        typer.echo(f"made again without {'it' if len(numbers) == 1 else 'them'}: {_some(later)}, now {_some(made)}")
    elif later:
        showing.note(
            f"{len(later)} later edit{'s were' if len(later) > 1 else ' was'} computed with {'it' if len(numbers) == 1 else 'them'} in the "
            f"weights ({_some(later)}) and stay{'' if len(later) > 1 else 's'} as {'they are' if len(later) > 1 else 'it is'}; "
            "--rebase computes such edits anew"
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 10 else f"{', '.join(map(str, numbers[:9]))} … {numbers[-1]}"


def _how(entry: Entry) -> str:
    """Method, and the objective if it is another than cross-entropy."""
    name, objective = str(entry.method.get("name", "")), entry.objective
    return name if objective is None or objective.get("name") == "ce" else f"{name}+{objective.get('name')}"


def _what(entry: Entry) -> str:
    more = f" and {len(entry.facts) - 1} more" if len(entry.facts) > 1 else ""
    return f"{entry.facts[0]}{more}" if entry.facts else ""


def _settings(record: Any) -> str:
    return ", ".join([str(record["name"]), *(f"{name}={value}" for name, value in record.items() if name != "name" and value is not None)])


def _open(edits: Path) -> Ledger:
    from errata.edits.ledger import Ledger

    return Ledger.open(edits)


def _write(edits: Path) -> Ledger:
    from errata.edits.ledger import Ledger

    return Ledger.write(edits)
