"""`errata draw`: the tables and pictures of a run, with the axes of the papers'."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from errata.bench.folder import PLAN, RECORDS, RESULTS, read_records
from errata.bench.plan import Plan, PlanError, did_you_mean, hash_cases
from errata.cli import show
from errata.cli.app import DataDirOption, JsonOption, app
from errata.report import CURVES, DRAWINGS, PICTURES, TOGETHER, DrawingError
from errata.report.overfitting import together
from errata.report.tables import Known, Sheet, edited, sheets


@app.command()
def draw(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help=f"Folders that 'errata bench' wrote; several: {', '.join(TOGETHER)}.")],
    what: Annotated[
        str | None, typer.Option(metavar="A,B", help=f"{', '.join(DRAWINGS)} (default: what the plan wants, else all that it can give).")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the files go (default: RUN).")] = None,
    case: Annotated[str | None, typer.Option(metavar="ID", help="Draw figure1, figure2 of this one edit (default: of all).")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tables and pictures of a run: printed, and as Markdown and PNG."""
    for folder in runs:
        if not (folder / RESULTS).is_file() or not (folder / PLAN).is_file():
            raise PlanError(f"{folder} holds no finished run ({RESULTS} is missing); finish it with: errata bench --resume --out {folder}")
    run = runs[0]
    plan, results = Plan.read(run / PLAN), json.loads((run / RESULTS).read_text(encoding="utf-8"))
    if len(runs) > 1:
        if case or what is None or not {name.strip() for name in what.split(",")} <= set(TOGETHER):
            raise PlanError(f"several runs are drawn together by {' and '.join(TOGETHER)} alone; add --what figure3, or give one run")
        results = together([json.loads((folder / RESULTS).read_text(encoding="utf-8")) for folder in runs])
    if case is not None:
        what, results = what or ",".join(CURVES), _of_case(run, results, case)
    asked = None if what is None else [name.strip() for name in what.split(",") if name.strip()]
    for name in asked or ():
        if name not in DRAWINGS:
            raise PlanError(f"unknown drawing {name!r}{did_you_mean(name, DRAWINGS)}")
    made: list[Path] = []
    missed: list[tuple[str, Exception]] = []
    for name in asked or plan.drawings or DRAWINGS:
        try:
            made.append(_make(name, plan, results, to or run, data_dir, shown=not as_json))
        except (DrawingError, ImportError) as error:
            if asked:
                raise
            missed.append((name, error))
    if not made:
        raise missed[0][1]
    for name, why in missed:
        if plan.drawings or isinstance(why, ImportError):  # where nothing was asked for, what a run does not hold is not missed
            show.note(f"{name}: {why}")
    if as_json:
        show.json_out({"files": [str(path) for path in made]})


def after_bench(plan: Plan, out: Path, results: Mapping[str, Any], data_dir: Path | None, shown: bool) -> None:
    """Make what the plan wants. The measurements are kept whatever happens here, so what cannot be made is said and no more."""
    for name in plan.drawings:
        try:
            _make(name, plan, results, out, data_dir, shown)
        except (DrawingError, ImportError) as error:
            show.note(f"{name}: {error}; the rest is kept")


def _make(name: str, plan: Plan, results: Mapping[str, Any], folder: Path, data_dir: Path | None, shown: bool) -> Path:
    """One drawing; the file that it became."""
    path = folder / f"{name}.{'png' if name in PICTURES else 'md'}"
    if name in PICTURES:
        if find_spec("matplotlib") is None:
            raise ImportError("pictures need matplotlib; install errata[plots], then: errata draw RUN")
        from errata.report import overfitting, sequence

        figure = (overfitting if name in overfitting.NAMES else sequence).picture(name, results)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    else:
        made = sheets(name, results, known(plan, results, data_dir) if name == "case-study" else None)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(sheet.markdown() for sheet in made), encoding="utf-8")
        for sheet in made if shown else ():
            show._print(_table(sheet))
    show.note(f"drawn: {path}")
    return path


def _of_case(run: Path, results: Mapping[str, Any], case: str) -> dict[str, Any]:
    """The results with the curves of one case alone in each row. Raises PlanError if there is no such case."""
    from errata.bench.results import averaged

    found = {key: record for key, record in read_records(run / RECORDS).items() if key[2] == case}
    if not found:
        raise PlanError(f"{run} has no case {case!r}; the field 'case' in {run / RECORDS} names them")
    rows = []
    for row in results["rows"]:
        record = found.get((f"{row['method']}+{row['objective']}", row["seed"], case))
        rows.append(row | {"curves": averaged([record]) if record else None})
    return {**results, "rows": rows}


def _table(sheet: Sheet) -> Table:
    """For a terminal, the best cells in bold."""
    drawn = Table(title=Text(sheet.title), title_justify="left", box=None, pad_edge=False)
    for column, heading in enumerate(sheet.headings):
        drawn.add_column(heading, justify="left" if column == 0 or sheet.wide else "right", no_wrap=column == 0)
    for i, row in enumerate(sheet.rows):
        drawn.add_row(*(Text(cell, style="bold" if (i, j) in sheet.best else "") for j, cell in enumerate(row)))
    return drawn


def known(plan: Plan, results: Mapping[str, Any], data_dir: Path | None) -> Known:
    """What was edited about the transcripts' prompts; nothing where the data is no longer at hand, or is no longer the same."""
    from errata import data

    if not plan.transcripts:
        return {}
    where = results["environment"]  # with the split, which a plan may leave to the run
    try:
        cases = data.load(plan.data, data_dir=data_dir, split=where.get("split"))
    except data.DataError as error:
        show.note(f"what was edited cannot be said: {error}")
        return {}
    if hash_cases(cases) != where["data_hash"]:
        show.note(f"what was edited cannot be said: {plan.data} is no longer the data of this run")
        return {}
    return dict(_pairs(plan, cases))


def _pairs(plan: Plan, cases: Sequence[Any]) -> Iterator[tuple[tuple[int, str], str]]:
    for seed in plan.seeds:
        facts = [fact for case in plan.draw(cases, seed) for fact in case.facts]
        for prompt, text in edited(plan.transcripts, facts).items():
            yield (seed, prompt), text
