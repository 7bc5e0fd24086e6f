"""One correction as an object: what it adds to the weights, for which facts, made how."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.disk import drafted
from errata.edits.delta import KINDS, Delta, check_matrix
from errata.edits.errors import EditError
from errata.edits.memory import Memory, load_memory
from errata.edits.stack import Stack
from errata.facts import Fact
from errata.lm.loading import address

if TYPE_CHECKING:
    from errata.edits.export import Exported
    from errata.lm.model import LanguageModel

FORMAT = 3  # 1 knew no memories, 2 kept keys in the place of a trail
RECORD, TENSORS = "edit.json", "deltas.safetensors"


Layout = dict[str, Any]
"""What the tensors of an edit are: {"deltas": [{"kind", "path"}], "after": `Trail.after`, None without a trail}, ready for JSON."""

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """What a session that goes on from an edit must know of it, besides its deltas.

    after: names what it was made on: all that was in the session's memory and in the model. tensors: by names that the session chose.
    """

    after: str
    tensors: Mapping[str, Tensor]


class Edit:
    """What an editor leaves behind. Making it does not change the model; `apply` and `revert` do, exactly.

    lm: the model it was made for, named in `lm_fingerprint`.
    deltas: what is done to which weight, in this order.
    facts: what it is to make true.
    method, objective: name and hyper-parameters, ready for JSON; objective is None where nothing was optimised.
    diagnostics: steps, losses, seconds by stage …, ready for JSON.
    keys: path -> the keys [F, d_in] that it was solved with, one of each fact; empty for methods that use none. They are for who looks on
        while edits are made, and are not saved: a later session needs the trail only.
    memory: what is kept beside the weights, holding all earlier edits of its session too; None for methods that write into weights.
    metrics: what was measured of the model "before" and "after" it, by name, ready for JSON; None where nothing was.
    trail: what a session must know to go on from it; None for methods that carry nothing from edit to edit but what is in the weights.

    Raises EditError if a key tensor is no floating-point matrix, or still carries a graph.
    """

    def __init__(
        self,
        lm: LanguageModel,
        deltas: Sequence[Delta],
        facts: Sequence[Fact],
        method: Mapping[str, Any],
        objective: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        keys: Mapping[str, Tensor] | None = None,
        memory: Memory | None = None,
        metrics: Metrics | None = None,
        trail: Trail | None = None,
    ) -> None:
        self.lm = lm
        self.lm_fingerprint: str = lm.fingerprint  # taken before any edit can have changed the weights
        self.deltas = tuple(deltas)
        self.facts = tuple(facts)
        self.method = dict(method)
        self.objective = None if objective is None else dict(objective)
        self.diagnostics = dict(diagnostics or {})
        self.keys = dict(keys or {})
        self.memory = memory
        self.metrics = metrics
        self.trail = trail
        for path, tensor in self.keys.items():
            check_matrix(path, keys=tensor)

    def __repr__(self) -> str:
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        return f"Edit({str(self.facts[0]) if self.facts else 'no fact'!r}{more}, {self.method.get('name', 'unnamed')})"

    @cached_property
    def content(self) -> str:
        """Names what it is, whoever has it: its facts, deltas and memory, and on what it was made."""
        named = hashlib.sha256(repr([fact.to_dict() for fact in self.facts]).encode("utf-8", "backslashreplace"))
        for delta in self.deltas:
            for name, tensor in delta.tensors().items():
                named.update(f"{delta.kind} {delta.path} {name} {tensor.dtype} {list(tensor.shape)}".encode())
                named.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        named.update(f"{self.memory and self.memory.id} {self.trail and self.trail.after}".encode())
        return named.hexdigest()

    @property
    def applied(self) -> bool:
        """Whether its deltas are in the model's weights, and its memory is attached, now."""
        return Stack.of(self.lm).holds(self)

    def apply(self) -> None:
        """Write it into the model, on top of the edits that are applied already.

        Raises EditError if it is applied already or does not fit the weights, ModelError if they cannot be written to; in each case
        the model is unchanged.
        """
        Stack.of(self.lm).apply(self)

    def revert(self) -> None:
        """Take it out again: the weights are then bit for bit those of the other applied edits. Raises EditError if not applied."""
        Stack.of(self.lm).revert(self)

    @contextmanager
    def applied_(self) -> Iterator[Edit]:
        """`with edit.applied_(): …` applies it and reverts it on the way out, whatever happens."""
        self.apply()
        try:
            yield self
        finally:
            if self.applied:
                self.revert()

    def parts(self) -> tuple[Layout, dict[str, Tensor]]:
        """Its deltas and its trail as names and tensors; `assembled` puts them together again."""
        tensors = {f"{i}.{name}": tensor for i, delta in enumerate(self.deltas) for name, tensor in delta.tensors().items()}
        tensors |= {f"trail.{name}": tensor for name, tensor in (self.trail.tensors if self.trail else {}).items()}
        deltas = [{"kind": delta.kind, "path": delta.path} for delta in self.deltas]
        return {"deltas": deltas, "after": self.trail.after if self.trail else None}, tensors

    def save(self, folder: str | Path) -> None:
        """Write `edit.json` and `deltas.safetensors` into a new folder, all or nothing (a temporary folder, then a rename).

        Raises EditError if the folder exists and is not empty, or method, objective or diagnostics do not fit into JSON.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise EditError(f"{folder} exists already; choose another place for the edit, or remove it")
        with drafted(folder) as draft:
            layout, tensors = self.parts()
            memory = None if self.memory is None else self.memory.state()
            tensors |= {f"memory.{name}": tensor for name, tensor in (memory.pop("tensors") if memory else {}).items()}
            save_file(storable(tensors), draft / TENSORS)
            record = {
                "format": FORMAT,
                "model": {"name": address(self.lm.name), "fingerprint": self.lm_fingerprint},
                "facts": [fact.to_dict() for fact in self.facts],
                "method": self.method,
                "objective": self.objective,
                "diagnostics": self.diagnostics,
                "metrics": self.metrics,
                **layout,
                "memory": memory,
                "sha256": _sha256(draft / TENSORS),
            }
            try:
                (draft / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            except TypeError as error:
                raise EditError(f"{self} cannot be saved: method, objective and diagnostics must be plain JSON values ({error})") from error
            shutil.copymode(draft / RECORD, draft / TENSORS)  # safetensors writes for its owner alone

    def save_pretrained(self, folder: str | Path, format: str = "adapter", max_rank: int | None = None) -> Exported:
        """Write it in a form that is served without errata; see `errata.edits.export.export`."""
        from errata.edits.export import MAX_RANK, export

        return export([self], format, folder, max_rank or MAX_RANK)

    @staticmethod
    def base(folder: str | Path) -> tuple[str, str]:
        """Name and fingerprint of the model that a saved edit was made for. Raises EditError if the folder holds none."""
        path = Path(folder) / RECORD
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            return str(model["name"]), str(model["fingerprint"])
        except (FileNotFoundError, NotADirectoryError):
            raise EditError(f"{folder} holds no edits; give the folder that 'errata edit --out' or Edit.save wrote") from None
        except (ValueError, KeyError, TypeError) as error:
            raise EditError(f"{path} is damaged or no edit ({type(error).__name__}: {error}); save the edit again") from error

    @classmethod
    def load(cls, folder: str | Path, lm: LanguageModel) -> Edit:
        """Read what `save` wrote, for the same model.

        Raises EditError naming the file that is missing, damaged, of a newer format or made for another model.
        """
        path, tensor_path = Path(folder) / RECORD, Path(folder) / TENSORS
        for file in (path, tensor_path):
            if not file.is_file():
                raise EditError(f"{folder} holds no edits ({file.name} is missing); give a folder that 'errata edit' or Edit.save wrote")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            newer = record["format"] > FORMAT  # then nothing else in it can be relied on
            if not newer:
                name, fingerprint = str(record["model"]["name"]), str(record["model"]["fingerprint"])
                parts = [{"kind": KINDS[part["kind"]].kind, "path": str(part["path"])} for part in record["deltas"]]
                layout: Layout = {"deltas": parts, "after": record.get("after")}
                facts = [Fact.from_dict(fact) for fact in record["facts"]]
                method, diagnostics, sha256 = dict(record["method"]), dict(record["diagnostics"]), record["sha256"]
                objective = None if record["objective"] is None else dict(record["objective"])
                state, metrics = record.get("memory"), record.get("metrics")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not of this shape
            raise EditError(f"{path} is damaged or no edit ({type(error).__name__}: {error}); save the edit again") from error
        if newer:
            raise EditError(f"{path} has format {record['format']}, this errata reads up to {FORMAT}; install a newer errata")
        if fingerprint != lm.fingerprint:
            raise EditError(
                f"{path} was made for the model {name!r} ({fingerprint[:12]}), this is {lm.name!r} ({lm.fingerprint[:12]}); "
                "load that model in the same dtype, without edits in its weights"
            )
        if _sha256(tensor_path) != sha256:
            raise EditError(f"{tensor_path} is damaged: its SHA-256 is not the one in {RECORD}; save the edit again")
        try:
            tensors = load_file(tensor_path)
            deltas, trail = assembled(layout, tensors)
            memory = None if state is None else load_memory({**state, "tensors": _under("memory.", tensors)})
        except (SafetensorError, KeyError, TypeError, EditError) as error:
            raise EditError(f"{tensor_path} does not hold what {RECORD} names ({error}); save the edit again") from error
        return cls(lm, deltas, facts, method, objective, diagnostics, memory=memory, metrics=metrics, trail=trail)


def assembled(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[list[Delta], Trail | None]:
    """What `Edit.parts` took apart: deltas and trail. Raises KeyError, TypeError or EditError where they do not fit together."""
    deltas: list[Delta] = []
    for i, part in enumerate(layout["deltas"]):
        deltas.append(KINDS[part["kind"]](part["path"], **_under(f"{i}.", tensors)))
    after = layout.get("after")
    return deltas, None if after is None else Trail(str(after), _under("trail.", tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each on the CPU, whole, and with memory of its own, which safetensors wants."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
