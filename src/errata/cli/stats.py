"""`errata stats`: the second moments of a model's keys as files that are collected, added and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from errata.bench.plan import PlanError
from errata.cli import show
from errata.cli.app import DeviceOption, DtypeOption, JsonOption, ModelOption, ThreadsOption, _load, _threads, app

if TYPE_CHECKING:
    from errata.statistics import Moments

stats = typer.Typer(name="stats", help="Second moments of a model's keys over ordinary text.", no_args_is_help=True)
app.add_typer(stats)

OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write (safetensors).")]


@stats.command()
def collect(
    model: ModelOption,
    layers: Annotated[str, typer.Option(metavar="L", help="The layers that will be edited: 0,1,2 or 4-8.")],
    out: OutOption,
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="C", help="A .txt or .jsonl file, a folder, 'bundled', a data set NAME:CONFIG (default: the model's own text)."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop at so many (default: 10 for each dimension of a key).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was collected before it was stopped.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts of one forward pass, at most.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run text through a model and keep the second moments of its keys. May be stopped at any moment and resumed."""
    wanted = _layers(layers)
    _named(out)
    _not_there(out, resume)
    if corpus is not None:
        from errata.statistics import texts

        texts(corpus)  # a mistake in its name shows before the model is loaded
    _threads(threads)
    lm = _load(model, device, dtype)
    from errata.statistics import collect as collect_moments
    from errata.statistics import texts

    with show.progress("stats") as report:
        made = collect_moments(lm, texts(corpus, lm), wanted, tokens, batch_size, progress=report, path=out, resume=resume)
    result = {"file": str(out), **_about(made)}
    if as_json:
        show.json_out(result)
    else:
        _say(result)
    if made.count < made.width:
        show.note(f"{made.count} tokens say nothing about some of the {made.width} dimensions; give more text")


@stats.command()
def merge(
    pieces: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files of the same model and layers, over different text.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Add files that were collected over different pieces of text."""
    _named(out)
    if len(pieces) < 2:
        raise PlanError(f"there is nothing to add to {pieces[0]}; give at least two files")
    _not_there(out, resume=False)
    from errata.statistics import Moments

    first, *others = map(Moments.load, pieces)
    made = first.merge(*others)
    made.save(out)
    result = {"file": str(out), **_about(made)}
    if as_json:
        show.json_out(result)
    else:
        _say(result)


@stats.command("show")
def show_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'errata stats collect' wrote.")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="T", help="How large is the null space below this eigenvalue? Several are allowed: 0.02,0.1."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a file holds; with --threshold also eigenvalues and null spaces, which takes minutes where keys are wide."""
    thresholds = _thresholds(threshold or [])
    _threads(threads)
    from errata.statistics import Moments

    moments = Moments.load(file)
    result = {"file": str(file), **_about(moments), "fingerprint": moments.fingerprint, "pieces": list(moments.pieces)}
    rows = [_layer(moments, layer, thresholds) for layer in moments.layers]
    if as_json:
        show.json_out({**result, "by_layer": rows})
        return
    _say({**result, "fingerprint": moments.fingerprint[:12], "pieces": len(moments.pieces)})
    flat = [_flat(row) for row in rows]
    drawn = Table(*flat[0], box=None, pad_edge=False)
    for cells in flat:
        drawn.add_row(*cells.values())
    show._print(drawn)


def _say(result: dict[str, Any]) -> None:
    """One fact a line."""
    cells = ((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in result.items())
    show.listing([{"name": name, "value": value} for name, value in cells])


def _about(moments: Moments) -> dict[str, Any]:
    return {
        "model": moments.model,
        "corpus": moments.corpus,
        "tokens": moments.count,
        "layers": list(moments.layers),
        "width": moments.width,
    }


def _layer(moments: Moments, layer: int, thresholds: list[float]) -> dict[str, Any]:
    """Trace and effective rank (tr C)² / tr C², and from the eigenvalues the extremes, and each null space's share and energy."""
    moment = moments.mean(layer)
    trace = moment.trace().item()
    row: dict[str, Any] = {"layer": layer, "trace": trace, "effective_rank": trace**2 / moment.square().sum().item()}
    if thresholds:
        from errata.statistics import spectrum

        values = spectrum(moment)
        row |= {"smallest": values[0].item(), "largest": values[-1].item()}
        inside = [(bound, values[values < bound]) for bound in thresholds]
        row["null_space"] = [
            {"threshold": bound, "dimensions": len(small), "share": len(small) / len(values), "energy": max(small.sum().item(), 0.0)}
            for bound, small in inside
        ]
    return row


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    cells = {name.replace("_", " "): f"{row[name]:.4g}" for name in ("trace", "effective_rank", "smallest", "largest") if name in row}
    spaces = {f"below {space['threshold']:g}": f"{100 * space['share']:.1f} %" for space in row.get("null_space", ())}
    return {"layer": str(row["layer"]), **cells, **spaces}


def _layers(text: str) -> list[int]:
    """The numbers in "0,1,2" or "4-8". Raises PlanError for anything else."""
    wanted: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            numbers = range(int(low), int(high if dash else low) + 1)
        except ValueError:
            numbers = range(0)
        if not numbers:
            raise PlanError(f"--layers must be numbers like 0,1,2 or a range like 4-8 (got {text!r})")
        wanted += numbers
    return wanted


def _thresholds(given: list[str]) -> list[float]:
    try:
        return [float(part) for text in given for part in text.split(",")]
    except ValueError:
        raise PlanError(f"--threshold must be numbers like 0.02 or 0.02,0.1 (got {', '.join(given)!r})") from None


def _named(out: Path) -> None:
    """Editors tell statistics from text by the name."""
    if out.suffix != ".safetensors":
        raise PlanError(f"{out} must end in .safetensors, as files of statistics do; write --out {out}.safetensors")


def _not_there(out: Path, resume: bool) -> None:
    """Before anything heavy is loaded."""
    if out.is_dir():
        raise PlanError(f"{out} is a folder; --out must be a file")
    for path in (out, out.with_name(f"{out.name}.part")):
        if path.exists() and not resume:
            raise PlanError(f"{path} exists already; go on with --resume, give another --out, or remove it")
