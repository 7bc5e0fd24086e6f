"""`errata export`: an edit in a form that is served without errata."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errata.bench.plan import PlanError, did_you_mean
from errata.cli import show
from errata.cli.app import DeviceOption, DtypeOption, JsonOption, ThreadsOption, _folder, _load, _threads, app


@app.command()
def export(
    edits: Annotated[Path, typer.Argument(metavar="EDITS", help="A folder that 'errata edit' wrote.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A new folder.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="adapter: a LoRA folder for PEFT and vLLM. checkpoint: the whole edited model. patch: the base's files, the touched "
            "matrices rewritten.",
        ),
    ] = "adapter",
    model: Annotated[str | None, typer.Option(metavar="M", help="Default: the model that the edit names.")] = None,
    max_rank: Annotated[int, typer.Option(min=1, metavar="R", help="Of an adapter; what lies beyond is cut, and the loss printed.")] = 512,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """An edit as PEFT adapter, full checkpoint or patched checkpoint: to be served without errata."""
    from errata.edits.edited import base_of, read_edits
    from errata.edits.export import FORMATS, vllm_rank
    from errata.edits.export import export as write

    if format not in FORMATS:
        raise PlanError(f"unknown format {format!r}{did_you_mean(format, list(FORMATS))}")
    _folder(edits)
    base = base_of(edits)
    _threads(threads)
    made = read_edits(edits, _load(model or base.name, device, dtype or base.dtype or None))
    done = write(made, format, to, max_rank)
    if as_json:
        show.json_out(done.to_dict())
        return
    facts = sum(len(edit.facts) for edit in made)
    typer.echo(f"{to}: {format} of {facts} fact{'s' if facts != 1 else ''} in {len(done.modules)} matrices")
    if done.rank is not None:
        typer.echo(f"rank {done.rank}; vLLM: --max-lora-rank {vllm_rank(done.rank)}")
        for path, lost in done.residual.items():
            typer.echo(f"  {path}: {lost:.2%} of the change is not in the adapter; raise --max-rank, or export a checkpoint")
    if done.linked:
        typer.echo(f"rewritten: {', '.join(done.written)}; taken over: {', '.join(done.linked)}")
