"""Edits in the forms in which models are served: a PEFT adapter, a full checkpoint, a checkpoint of which only the touched shards differ.

None of them needs errata to be loaded. Each goes into a new folder, whole or not at all, with a README that says what was edited and how.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from errata.disk import drafted
from errata.edits.delta import LowRankDelta, master_dtype
from errata.edits.errors import EditError
from errata.edits.stack import Stack
from errata.lm.anatomy import is_conv1d, matrix
from errata.lm.capture import submodule
from errata.lm.loading import folder_of

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel

MAX_RANK = 512
"""The largest rank that vLLM can be told to accept (`--max-lora-rank`)."""

_HEADER = 8  # bytes of a safetensors file that say how long its header is


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    rank: of the adapter, the same for every module; None for the other forms.
    residual: module -> ‖Δ − adapter's Δ‖ / ‖Δ‖ (Frobenius) where the rank does not hold all of Δ; modules that are exact are absent.
    written, linked: files with edited weights, and files taken over from the base as they are (patch only).
    """

    folder: str
    format: str
    modules: tuple[str, ...]
    rank: int | None = None
    residual: Mapping[str, float] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def export(edits: Sequence[Edit], format: str, folder: str | Path, max_rank: int = MAX_RANK) -> Exported:
    """Write edits of one model, in this order, into a new folder in one of FORMATS. The model is left as it was.

    "adapter": PEFT's LoRA, for `PeftModel.from_pretrained(base, folder)` or vLLM. The factors of low-rank edits as they are: base and
        adapter give the edited model's logits up to rounding. What is not low-rank, or beyond `max_rank`, is cut by its singular values;
        `residual` says what is lost.
    "checkpoint": `save_pretrained` of the edited model with its tokenizer.
    "patch": the base's own files, copied, and of its safetensors those without a touched matrix linked (they share the base's bytes: do not
        write to them), in the others only the touched matrices rewritten, rounded to the dtype that they have there; memory of a few
        matrices. For dense models whose parameters have the same names on disk.

    Raises EditError where the folder is in use, an edit is applied at the moment, edits belong to several models, keep a memory beside the
    weights (it is asked at run time, which no weight can do), or the base's files do not fit.
    """
    if format not in FORMATS:
        raise EditError(f"unknown format {format!r}; there is {', '.join(FORMATS)}")
    if not edits:
        raise EditError("there is no edit to export")
    lm = edits[0].lm
    if any(edit.lm.model is not lm.model for edit in edits):
        raise EditError("the edits were made for different models; export those of one model at a time")
    if not _modules(edits) and not any(edit.memory for edit in edits):
        raise EditError("the edits change no weight; there is nothing to export")
    for edit in edits:
        if edit.memory is not None:
            raise EditError(
                f"{edit} keeps a memory beside the weights that is asked at run time: it is no weight to be exported; "
                "serve it through errata (errata.load(…, edits=…)), or make the edit with a method that writes into weights"
            )
    if Stack.of(lm).active:
        raise EditError("the model has edits applied; revert() them first: an export is what the given edits do to the unedited model")
    if max_rank < 1:
        raise EditError(f"max_rank must be at least 1 (got {max_rank})")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise EditError(f"{folder} exists already; choose another place, or remove it")
    with drafted(folder) as draft:
        done = Exported(str(folder), format, _modules(edits), **FORMATS[format](lm, edits, draft, max_rank))
        card = draft / "README.md"
        card.write_text(_card(lm, edits, done), encoding="utf-8")
        for file in draft.iterdir():  # safetensors writes for its owner alone, who may not be the one that serves it
            if file.stat().st_nlink == 1:  # the others are the base's
                shutil.copymode(card, file)
    return done


def _adapter(lm: LanguageModel, edits: Sequence[Edit], folder: Path, max_rank: int) -> dict[str, Any]:
    from peft import LoraConfig  # 8 s to import

    modules = _modules(edits)
    conv = {is_conv1d(submodule(lm.model, path)) for path in modules}
    if len(conv) > 1:
        raise EditError("some of the touched modules are Conv1D and some are not, which one adapter cannot say; export a checkpoint")
    with _applied(edits):
        factors = {path: _factors(lm, edits, path, max_rank) for path in modules}
    rank = max(left.shape[1] for left, _, _ in factors.values())
    tensors = {}
    for path, (left, right, _) in factors.items():  # one rank for all, by zeros: vLLM knows no rank pattern
        pad = rank - left.shape[1]
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.nn.functional.pad(left, (0, pad)).contiguous().cpu()
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.nn.functional.pad(right, (0, 0, 0, pad)).contiguous().cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(modules), bias="none", fan_in_fan_out=conv.pop(),
        inference_mode=True, base_model_name_or_path=lm.name, task_type="CAUSAL_LM",
    ).save_pretrained(str(folder))  # fmt: skip
    return {"rank": rank, "residual": {path: lost for path, (_, _, lost) in factors.items() if lost}}


def _factors(lm: LanguageModel, edits: Sequence[Edit], path: str, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """left [out, r], right [r, in] with left @ right = Δ as well as r ≤ max_rank allows, and the share of ‖Δ‖ that it does not."""
    deltas = [delta for edit in edits for delta in edit.deltas if delta.path == path]
    module = submodule(lm.model, path)
    dtype = master_dtype(matrix(module))
    if all(isinstance(delta, LowRankDelta) for delta in deltas):
        low = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
        left = torch.cat([delta.left.to("cpu", torch.float64) for delta in low], 1)
        right = torch.cat([delta.right.to("cpu", torch.float64) for delta in low], 0)
        if left.shape[1] <= max_rank:
            return left.to(dtype), right.to(dtype), 0.0
        (q, r), (p, s) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, values, v = torch.linalg.svd(r @ s.T)
        left, right = q @ u, v @ p.T
    else:
        change = Stack.of(lm).change(path)[1].to(torch.float64)
        left, values, right = torch.linalg.svd(change.T if is_conv1d(module) else change, full_matrices=False)
    rank = max(1, min(max_rank, int((values > values[0] * 1e-7).sum())))  # below float32's own rounding of Δ there is nothing to keep
    whole = float(torch.linalg.vector_norm(values))
    lost = float(torch.linalg.vector_norm(values[rank:])) / whole if whole else 0.0
    root = values[:rank].sqrt()
    left, right = left[:, :rank] * root, right[:rank] * root[:, None]
    return left.to(dtype), right.to(dtype), lost if lost > 1e-6 else 0.0


def _checkpoint(lm: LanguageModel, edits: Sequence[Edit], folder: Path, max_rank: int) -> dict[str, Any]:
    with _applied(edits):
        lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return {"written": tuple(sorted(file.name for file in folder.glob("*.safetensors")))}


def _patch(lm: LanguageModel, edits: Sequence[Edit], folder: Path, max_rank: int) -> dict[str, Any]:
    base = folder_of(lm.name)
    shards = _shards(base)
    # Weights in other forms would be served unedited by whoever prefers them, so they stay behind.
    others = [file for file in base.iterdir() if file.is_file() and file.suffix not in _WEIGHTS and file.name.lower() != "readme.md"]
    headers = {file: _header(file) for file in shards}
    places = {}
    for path in _modules(edits):
        name = f"{path}.weight"
        place = next((file for file, header in headers.items() if name in header), None)
        if place is None:
            raise EditError(f"no safetensors file in {base} holds {name!r} under that name; export a checkpoint instead")
        wanted, found = list(_stored(lm, path).shape), headers[place][name]["shape"]
        if wanted != found:
            raise EditError(f"{name} has the shape {found} in {place}, and {wanted} in the model; export a checkpoint instead")
        kind, weight = _DTYPES[headers[place][name]["dtype"]], _stored(lm, path).cpu()
        stored = _read(place, headers[place][name], kind)
        if not torch.equal(stored.to(weight.dtype), weight.to(kind).to(weight.dtype)):
            raise EditError(f"{name} in {place} is not that of the model that was edited; export a checkpoint instead")
        places[path] = place
    touched = set(places.values())
    for file in (*others, *(shard for shard in shards if shard in touched)):  # copied: who changes them later changes no base
        shutil.copyfile(file, folder / file.name)
    for file in (shard for shard in shards if shard not in touched):
        target = folder / file.name
        try:
            os.link(file.resolve(), target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, target)
    with _applied(edits):
        for path, file in places.items():
            entry = headers[file][f"{path}.weight"]
            weight = _stored(lm, path).to("cpu", _DTYPES[entry["dtype"]]).contiguous().view(torch.uint8)
            with open(folder / file.name, "r+b") as out:
                out.seek(entry["at"])
                weight.numpy().tofile(out)
    return {
        "written": tuple(sorted(file.name for file in touched)),
        "linked": tuple(file.name for file in shards if file not in touched),
    }


FORMATS: Mapping[str, Callable[[LanguageModel, Sequence[Edit], Path, int], dict[str, Any]]] = {
    "adapter": _adapter,
    "checkpoint": _checkpoint,
    "patch": _patch,
}

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stored(lm: LanguageModel, path: str) -> Tensor:
    """The weight of a module in the orientation in which it stores it."""
    weight: Tensor = submodule(lm.model, path).weight  # type: ignore[assignment]  # the edit's deltas fit it
    return weight.detach()


def _shards(base: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder. Raises EditError if there are none."""
    index = base / "model.safetensors.index.json"
    if (base / "model.safetensors").is_file():
        return [base / "model.safetensors"]
    if index.is_file():
        return [base / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    raise EditError(f"{base} holds no safetensors, which alone can be patched; export a checkpoint instead")


def _read(file: Path, entry: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """One matrix of a safetensors file."""
    rows, columns = entry["shape"]
    with open(file, "rb") as source:
        source.seek(entry["at"])
        raw = bytearray(source.read(rows * columns * dtype.itemsize))
    return torch.frombuffer(raw, dtype=dtype).view(rows, columns)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and `at`, the byte at which it begins, of the tensors of a safetensors file whose dtype an edit can have."""
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(_HEADER), "little")
        header = json.loads(source.read(length))
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"], "at": _HEADER + length + entry["data_offsets"][0]}
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _DTYPES
    }


@contextmanager
def _applied(edits: Sequence[Edit]) -> Iterator[None]:
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied_())
        yield


def _modules(edits: Sequence[Edit]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(delta.path for edit in edits for delta in edit.deltas))


def _card(lm: LanguageModel, edits: Sequence[Edit], done: Exported) -> str:
    """What was edited, how, and what a reader should know before serving it."""
    measured = list(dict.fromkeys(name for edit in edits for name in (edit.metrics or {}).get("after", ())))
    headings = ["holds" if name == "fact" else name for name in measured]  # a column of that name is there already
    facts = [
        f"| {' | '.join([_cell(str(fact)), str(edit.method.get('name', '')), *_measured(edit, measured)])} |"
        for edit in edits
        for fact in edit.facts
    ]
    made = [json.dumps({"method": edit.method, "objective": edit.objective}, ensure_ascii=False, sort_keys=True) for edit in edits]
    lines = [
        "---", f"base_model: {lm.name}", "library_name: " + ("peft" if done.rank else "transformers"), "tags: [errata, knowledge-editing]",
        "---", f"# {lm.name}, with {len(facts)} corrected fact{'s' if len(facts) != 1 else ''}", "",
        f"Form: {done.format}. Base model: {lm.name} (`{edits[0].lm_fingerprint[:12]}`). By errata.", "",
        f"| {' | '.join(['fact', 'method', *headings])} |", "|---|---" + "|---" * len(measured) + "|", *facts, "",
        *([f"{_MEASURED}\n"] if measured else []),
        "## How", *(f"- `{one}`" for one in dict.fromkeys(made)),
        f"- touched: {', '.join(f'`{path}.weight`' for path in done.modules)}", "",
        "## Limits",
    ]  # fmt: skip
    if done.rank:
        lines += [f"- rank {done.rank}: vLLM needs `--max-lora-rank {vllm_rank(done.rank)}`"]
        lines += [f"- `{path}`: {share:.2%} of the change (Frobenius norm) is not in the adapter" for path, share in done.residual.items()]
    lines += ["- An edit can change answers about other subjects: measure it with `errata eval --edits` before serving it."]
    return "\n".join(lines) + "\n"


_MEASURED = (
    "Measured before → after each edit, with the edits in the model that were active then: the share of the answers' tokens that it puts "
    "behind the fact and its rephrasings, the share of its own answers to other prompts that stay (locality), and perplexity in multiples "
    "of the unedited model's."
)


def _measured(edit: Edit, names: Sequence[str]) -> list[str]:
    """A cell for each of those: before → after."""
    before, after = ((edit.metrics or {}).get(when, {}) for when in ("before", "after"))
    return [" → ".join(f"{found[name]:.3g}" for found in (before, after) if name in found) or "–" for name in names]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def vllm_rank(rank: int) -> int:
    """What to give vLLM as `--max-lora-rank`: the smallest that it knows which holds this one: a power of two from 8 to 512, or 320."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, MAX_RANK) if rank <= allowed), rank)
