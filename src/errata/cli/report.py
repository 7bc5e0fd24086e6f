"""`errata report`: runs as one page, or as tables for a paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.bench.folder import PLAN, RECORDS, RESULTS, read_records
from errata.bench.plan import Plan, PlanError
from errata.cli import show
from errata.cli.app import DataDirOption, JsonOption, app
from errata.cli.draw import known
from errata.disk import replacing

if TYPE_CHECKING:
    from errata.report.story import Run

FORMS = (".html", ".md", ".tex")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders that 'errata bench' wrote; several stand side by side.")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="report.html (one page, no network), table.md or table.tex.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was edited, did it work, what did it cost, how does it go on: one page, or tables for a paper."""
    if to.suffix not in FORMS:
        raise PlanError(f"cannot write {to}: the name must end in {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    from errata.report.page import page, sheets
    from errata.report.story import story

    told = story([read_run(folder, data_dir, name) for folder, name in zip(runs, names(runs), strict=True)])
    if to.suffix == ".html":
        text = page(told)
    else:
        text = "\n".join(sheet.markdown() if to.suffix == ".md" else sheet.latex() for sheet in sheets(told))
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as file:
        file.write_text(text, encoding="utf-8")
    if as_json:
        show.json_out({"file": str(to), "methods": [line.label for line in told.lines], "cases": len(told.cases)})
    else:
        typer.echo(f"{to}: {len(told.lines)} methods, {len(told.cases)} cases, {to.stat().st_size / 1e6:.1f} MB")


def names(folders: Sequence[Path]) -> list[str]:
    """A name for each run, no longer than it takes to tell them apart: its folder's, with those that it lies in.

    Raises PlanError for one that is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if twice := next((folder for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1), None):
        raise PlanError(f"{twice} is given twice; give each run once")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({own[-n:] for own in parts}) == len(parts))
    return ["/".join(own[-length:]) for own in parts]


def read_run(folder: Path, data_dir: Path | None = None, name: str | None = None) -> Run:
    """A finished run. Raises PlanError where the folder holds none. data_dir: see `known`; name: instead of the folder's."""
    from errata.report.story import Run

    if not (folder / RESULTS).is_file() or not (folder / PLAN).is_file():
        raise PlanError(f"{folder} holds no finished run ({RESULTS} is missing); finish it with: errata bench --resume --out {folder}")
    text = (folder / PLAN).read_text(encoding="utf-8")
    plan = Plan.read(folder / PLAN)
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    records = list(read_records(folder / RECORDS).values())
    return Run(name or folder.resolve().name, plan.to_dict(), text, results, records, known(plan, results, data_dir))
