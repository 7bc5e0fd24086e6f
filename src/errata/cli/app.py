"""The commands. Each one parses its options, calls the rooms below, and prints; nothing is computed here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata import __version__
from errata.bench.folder import claim
from errata.bench.plan import ALSO, Plan, PlanError, Protocol, known_split, parse_settings, unlabelled
from errata.cli import show

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.lm import LanguageModel

app = typer.Typer(
    name="errata",
    help="Correct single facts inside a language model, measure what else moved, keep every correction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[str, typer.Option("--model", metavar="M", help="A hub id, a folder, or 'atlas' (bundled).")]
DeviceOption = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 … (default: the loader's choice).")]
DtypeOption = Annotated[str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16 … (default: the checkpoint's).")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads (default: $OMP_NUM_THREADS, or the cores).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DataDirOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the named data sets lie (default: $ERRATA_DATA).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME.KEY=VALUE", help="A hyper-parameter: lora.lr=1e-3, ft-m+overtone.epsilon=0.01.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only N cases (bench draws them by seed).")]
SplitOption = Annotated[str | None, typer.Option(metavar="SPLIT", help="A part of the data set: test, dev, train (default: test).")]


class Failed(RuntimeError):
    """A part of what was asked for could not be done; the rest is kept."""


class Kind(StrEnum):
    """What `errata list` can list."""

    methods = "methods"
    objectives = "objectives"
    data = "data"
    models = "models"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def demo(threads: ThreadsOption = None, as_json: JsonOption = False) -> None:
    """The whole story on the bundled model, about a minute."""
    _threads(threads)
    from errata.cli.demo import run

    run(as_json=as_json)


@app.command()
def ask(
    model: ModelOption,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What the model is to continue.")],
    edits: Annotated[Path | None, typer.Option(metavar="EDITS", help="A folder that 'errata edit' wrote.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How far to continue.")] = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the model says, before and after the edits, side by side."""
    _folder(edits)
    _threads(threads)
    lm = _load(model, device, dtype or _dtype(edits))
    rows: list[dict[str, str]] = [{"prompt": prompt, "before": lm.complete(prompt, max_new_tokens=max_new_tokens)} for prompt in prompts]
    if made := _edits(edits, lm):
        with made.applied_():
            for row in rows:
                row["after"] = lm.complete(row["prompt"], max_new_tokens=max_new_tokens)
    if as_json:
        show.json_out(rows)
    else:
        show.before_and_after(rows)


@app.command("eval")
def evaluate(
    model: ModelOption,
    data: Annotated[str | None, typer.Option(metavar="D", help="A data set's name or a file.")] = None,
    edits: Annotated[Path | None, typer.Option(metavar="EDITS", help="Measure with these edits applied.")] = None,
    ability: Annotated[
        bool,
        typer.Option("--ability", help="General ability in the place of cases, before the edits and after: lm-eval on the live model."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="With --ability (default: cola,mmlu,mrpc,nli,rte,sst2,perplexity); any task of lm-eval by name."),
    ] = None,
    variant: Annotated[
        str, typer.Option(metavar="V", help="With --ability: 'probability' of each answer, or 'generate' five tokens.")
    ] = "probability",
    data_dir: DataDirOption = None,
    limit: LimitOption = None,
    split: SplitOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure without editing. With --data atlas: does the model know the bundled world, and can it be edited?"""
    _folder(edits)
    if ability:
        from errata.cli import ability as abilities
        from errata.data import ENVIRONMENT

        data_dir = data_dir or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
        names = abilities.asked(tasks, variant, data_dir, limit or 100)
        _threads(threads)
        lm = _load(model, device, dtype or _dtype(edits))
        able = abilities.run(lm, _edits(edits, lm), names, variant, limit or 100, data_dir)
        show.json_out(able) if as_json else abilities.tell(able)
        return
    if data is None:
        raise PlanError("eval needs --data D, or --ability")
    cases = None
    if data == "atlas":
        side = known_split(split)
    else:
        from errata.data import load as load_cases

        cases = load_cases(data, data_dir=data_dir, limit=limit, split=split)
    _threads(threads)
    lm = _load(model, device, dtype or _dtype(edits))
    made = _edits(edits, lm)
    if cases is None:
        from errata.bench.knowledge import measure

        show.note(f"asking about the bundled world, then trying {limit or 200} edits (200 take about three minutes)")
        with made.applied_() if made else nullcontext():
            known = asdict(measure(lm, facts=limit, edits=limit or 200, split=side))
        show.json_out(known) if as_json else show.shares(known)
    else:
        from errata.bench.run import evaluate as evaluate_cases

        with show.progress("measuring") as told:
            result = evaluate_cases(lm, cases, made, progress=told)
        show.json_out(result) if as_json else show.percentages(result)


@app.command()
def bench(
    plan: Annotated[Path | None, typer.Argument(metavar="[PLAN.yaml]", help="A plan file; options beside it take precedence.")] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="A hub id, a folder, or 'atlas' (bundled).")] = None,
    data: Annotated[str | None, typer.Option(metavar="D", help="A data set's name or a file.")] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="See 'errata list methods'.")] = None,
    objectives: Annotated[str | None, typer.Option(metavar="A,B", help="See 'errata list objectives' (default: ce).")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="single (default): each case from the unedited model. continual:T: T in a row, measured, then again from the unedited "
            "model. sequential:N: N in a row.",
        ),
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="A,B", help="Measure a sequence after so many edits (default: five equal parts).")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(metavar="WHEN", help="after-sequence (at checkpoints, after T edits), after-each (its own edit), or both.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Cases edited together: in a row as one edit (default: 1), else side by side (by memory)."),
    ] = None,
    curves: Annotated[bool, typer.Option("--curves", help="Look at single edits after every step: what figure1 and figure2 show.")] = False,
    transcript: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="Keep how the model goes on here, before and after a sequence.")
    ] = None,
    also: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help=f"Measure a sequence's checkpoints beside its cases, before and after: {', '.join(ALSO)} (tests from --data-dir; "
            "--set ability.limit=50).",
        ),
    ] = None,
    limit: LimitOption = None,
    split: SplitOption = None,
    seed: Annotated[str | None, typer.Option(metavar="S", help="One seed, or several: 0,1,2 (default: 0).")] = None,
    setting: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="The run folder (default: a new one in runs/).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what RUN already holds.")] = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    workers: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Processes that share the work, each with a model of its own and its share of the threads."),
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Methods × objectives over a data set: one edit at a time, or many in a row. May be stopped at any moment and resumed."""
    given = {
        "model": model,
        "data": data,
        "methods": _names(methods),
        "objectives": _names(objectives),
        "protocol": protocol,
        "checkpoints": _numbers("--checkpoints", checkpoints),
        "measure": measure,
        "batch": batch,
        "curves": curves or None,
        "transcripts": transcript or None,
        "also": _names(also),
        "limit": limit,
        "split": split,
        "seeds": _numbers("--seed", seed),
        "dtype": dtype,
        "threads": threads,
    }
    options = {name: value for name, value in given.items() if value is not None}
    base = _fitting(Plan.read(plan).resolved(model).to_dict(), options) if plan else {}
    settings = {owner: dict(values) for owner, values in base.get("settings", {}).items()}
    for owner, values in parse_settings(setting or ()).items():
        settings.setdefault(owner, {}).update(values)
    wanted = Plan.from_dict({**base, **options, "settings": settings}, _what(plan))
    if out is None:
        if resume:
            raise PlanError("--resume needs --out RUN: the folder of the run that is to go on")
        out = _free(Path("runs"), f"{Path(wanted.model).name}-{Path(wanted.data).stem}")
    wanted = claim(wanted, out, resume)
    _threads(wanted.threads)
    from errata.bench.run import run

    with show.progress("bench") as told:
        load = partial(_load, wanted.model, device, wanted.dtype)
        result = run(wanted, out, resume=resume, data_dir=data_dir, load=load, progress=told, workers=workers)
    if as_json:
        show.json_out(result)
    else:
        show.table(result)
        show.note(f"{out}: plan.yaml, records.jsonl, results.json")
    if wanted.drawings:
        draw.after_bench(wanted, out, result, data_dir, shown=not as_json)
    for row in result["rows"]:
        if row.get("finish_error"):
            raise Failed(f"{row['method']} could not do what it does at the end of a sequence: {row['finish_error']}")
    if failed := sum(row["failed"] for row in result["rows"]):
        raise Failed(f"{failed} edits could not be made; the field 'error' of {out / 'records.jsonl'} says why")


@app.command("list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: JsonOption = False,
) -> None:
    """The names that the other commands take."""
    from errata.cli.catalogue import catalogue

    rows = catalogue(kind.value)
    if as_json:
        show.json_out(rows)
    else:
        show.listing(rows)


def _fitting(base: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A plan file's fields, without what has no place any more beside the options: checkpoints beyond a shorter sequence (without any,
    the plan has its own), settings of methods that are not run, and `only` where it speaks of what is not run."""
    if "protocol" in options:
        name, size = Protocol.parse(options["protocol"])
        base["checkpoints"] = [mark for mark in base["checkpoints"] if name == "sequential" and mark <= (size or 0)]
    wanted, objectives = ({**base, **options}[name] for name in ("methods", "objectives"))
    left = {name: [one for one in only if one in objectives] for name, only in base["only"].items() if name in wanted}
    base["only"] = {name: only for name, only in left.items() if only}
    gone, kept = (
        {*(name for method in source["methods"] for name in (method, unlabelled(method))), *source["also"]}
        for source in (base, {**base, **options})
    )
    gone -= kept
    base["settings"] = {
        owner: values for owner, values in base["settings"].items() if owner in kept or not gone & {owner, owner.rpartition("+")[0]}
    }  # "memit+history" is a method's, "memit+ce" a pair's
    return base


def _load(model: str, device: str | None, dtype: str | None) -> LanguageModel:
    from transformers.utils.logging import disable_progress_bar

    from errata.lm import load

    disable_progress_bar()  # type: ignore[no-untyped-call]  # a line of ours says enough
    if parent_process() is None:  # it is said once, not by each worker
        show.note(f"loading {model}")
    return load(model, dtype=dtype, device=device)


def _edits(folder: Path | None, lm: LanguageModel) -> Edit | None:
    """All that a folder holds, as one edit."""
    from errata.edits.edited import read_edits, together

    return None if folder is None else together(lm, read_edits(folder, lm))


def _dtype(edits: Path | None) -> str | None:
    """The one that a folder of edits was made in, None if there is none, or it does not say."""
    if edits is None:
        return None
    from errata.edits.edited import base_of

    return base_of(edits).dtype or None


def _threads(wanted: int | None) -> None:
    """Set torch's CPU threads: as asked, else as OMP_NUM_THREADS says (torch reads it), else one for each physical core, at most 16."""
    import psutil
    import torch

    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(wanted or min(psutil.cpu_count(logical=False) or allowed, allowed, 16))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(f"{option} must be whole numbers like 1 or 1,2,3 (got {text!r})") from None


def _what(plan: Path | None) -> str:
    return str(plan) if plan else "bench needs --model, --data and --methods, or a plan file"


def _free(parent: Path, name: str) -> Path:
    """The first folder that is not there yet: name, name-2, name-3 …"""
    number = 1
    while (place := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return place


def _folder(edits: Path | None) -> None:
    if edits is not None and not edits.is_dir():
        raise PlanError(f"no folder {edits}; --edits takes what 'errata edit --out' wrote")


from errata.cli import draw, edit, export, ledger, report, stats  # noqa: E402, F401  # they add their commands to `app`, and need the options above
