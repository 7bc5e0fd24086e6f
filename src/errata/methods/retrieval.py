"""The retrieval baseline: the edited facts stand in the prompt of the questions that are about them. An edit that cannot beat it is not
worth its risk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.edit import Edit
from errata.edits.memory import grown_id, load_memory
from errata.edits.notes import By, Notes, embed
from errata.facts import Fact
from errata.lm.errors import ModelError
from errata.methods.base import Method, Session, check_range

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective


@dataclass(frozen=True)
class Retrieval(Method):
    """No weight changes: a question is read behind the facts that it is about (in-context editing, Zheng et al. 2023, without its
    demonstrations). Nothing is optimised, so there is no objective.

    by: how the facts are found, see `Notes`: "bm25" needs the package bm25s; "embedding" takes the model's own states.
    k: at most so many facts before a question.
    threshold: None: 1 for "bm25" (every word of the subject is in the question), 0.8 for "embedding", which hangs on the model.
    form: how a fact is put; `{}` is its sentence. A line of its own by default, so that the question's tokens stay what they are.
    layer: for "embedding": the states that enter it; None: the middle one.
    """

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = "IKE without demonstrations: arXiv 2305.12740; BM25: Robertson et al. 1994"
    optimises: ClassVar[bool] = False

    by: By = "bm25"
    k: int = 1
    threshold: float | None = None
    form: str = "{}\n"
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.by not in ("bm25", "embedding"):
            raise ValueError(f"{self.name}: by must be 'bm25' or 'embedding', got {self.by!r}")
        if "{}" not in self.form:
            raise ValueError(f"{self.name}: form must have {{}} where the fact stands, got {self.form!r}")
        check_range(self.name, "k", self.k, 1)
        check_range(self.name, "threshold", self.threshold, -1, 1)

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`. Raises ValueError for another objective than the default: it would change nothing."""
        if objective is not None and objective.name != "ce":
            raise ValueError(f"{self.name} optimises nothing, so {objective.name!r} would change nothing; leave the objective out")
        layers = len(lm.anatomy.layers)
        chosen = replace(
            self,
            threshold={"bm25": 1.0, "embedding": 0.8}[self.by] if self.threshold is None else self.threshold,
            layer=(layers // 2 if self.layer is None else self.layer) if self.by == "embedding" else None,
        )
        if chosen.layer is not None and not 0 <= chosen.layer < layers:
            raise ModelError(f"{lm.name} has layers 0 to {layers - 1}, not {chosen.layer}; choose one of these for {self.name}")
        return _Noting(lm, chosen, objective, seed)


class _Noting(Session):
    method: Retrieval

    def __init__(self, lm: LanguageModel, method: Retrieval, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        self.notes: Notes | None = None

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = time.perf_counter()
        method, before = self.method, self.notes
        assert method.threshold is not None  # `start` filled it in
        for fact in facts:
            self.encode(fact)
        facts_now = {fact.text: fact for fact in facts}  # of two answers to one prompt the last one holds
        vectors = None if method.layer is None else embed(self.lm, list(facts_now), method.layer).to("cpu", torch.float32)
        old = [] if before is None else [i for i, fact in enumerate(before.facts) if fact.text not in facts_now]
        noted = list(facts_now.values())
        if before is not None:
            noted = [before.facts[i] for i in old] + noted
            if vectors is not None and before.vectors is not None:
                vectors = torch.cat([before.vectors[old], vectors])
        parent = None if before is None else before.id
        name = grown_id(parent, [fact.to_dict() for fact in facts], method.to_dict(), self.seed, self.count)
        notes = Notes(tuple(noted), method.by, method.k, method.threshold, method.form, name, parent, layer=method.layer, vectors=vectors)
        diagnostics = {"notes": len(noted), "seconds": time.perf_counter() - clock}
        return Edit(self.lm, [], facts, method.to_dict(), self.record(), diagnostics, memory=notes)

    def remember(self, edit: Edit) -> None:
        """See `Session.remember`."""
        super().remember(edit)
        assert isinstance(edit.memory, Notes)
        self.notes = edit.memory

    def state_dict(self) -> dict[str, Any]:
        """The notes too."""
        return super().state_dict() | {"notes": None if self.notes is None else self.notes.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        notes = None if state["notes"] is None else load_memory(state["notes"])
        assert notes is None or isinstance(notes, Notes)
        self.notes = notes
