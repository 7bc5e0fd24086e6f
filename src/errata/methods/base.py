"""What a method is: frozen hyper-parameters that start a session, which turns facts into edits."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from errata.edits.delta import Delta
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.edits.memory import Memory
from errata.facts import Fact, FactError
from errata.lm.errors import ModelError
from errata.lm.tokens import Encoded, encode
from errata.methods.families import family
from errata.objectives import get as get_objective
from errata.objectives.base import Objective

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


Watch = Callable[[int, AbstractContextManager[object]], None]
"""(steps done, half-made edit): called before each step and after the last. While the context lasts the half-made edit is in the model,
with dropout off and nothing else of the training in it, so that any prompt may be asked; the weights must be left as they are."""


@contextmanager
def half_made(lm: LanguageModel, memory: Memory, whole: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """For a `Watch`: the memory as it is so far, in the whole model. whole: what `from_layer` yields."""
    with whole(), memory.attached(lm):
        yield


def check_length(lm: LanguageModel, fact: Fact, texts: Sequence[Encoded]) -> None:
    """Raise FactError if one of a fact's texts is longer than the model can take."""
    try:
        lm.check_length(max(len(text.ids) for text in texts))
    except ModelError as error:
        raise FactError(f"{str(fact)[:80]!r}: {error}") from error


def refuse_broken(lm: LanguageModel, losses: Sequence[float]) -> None:
    """Raise EditError if already the first loss, before any step, is no number."""
    if len(losses) == 1 and not math.isfinite(losses[0]):
        raise EditError(f"{lm.name} gives no finite probabilities; its weights are broken: revert the last edits, or load it anew")


def check_range(owner: str, name: str, value: float | None, low: float, high: float = math.inf, above: bool = False) -> None:
    """Raise ValueError unless a hyper-parameter is None or from `low` (`above`: greater than it) to `high`."""
    if value is not None and not (low < value <= high if above else low <= value <= high):
        limits = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise ValueError(f"{owner}: {name} must be {limits}, got {value!r}")


@dataclass(frozen=True)
class Method(ABC):
    """An editor's hyper-parameters. Those that are None are filled in by `for_model`.

    name, paper: what it is called, and where it comes from.
    optimises: whether it minimises an objective; see also `errata.methods.WITHOUT_OBJECTIVE`.
    for_sets: whether it is meant for many facts in one edit, in the place of one at a time.
    family_defaults: model family -> values for that family; "" for every other model.
    objective_defaults: objective -> its values in this method's hands (the papers' ε differs from method to method).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    optimises: ClassVar[bool] = True
    for_sets: ClassVar[bool] = False
    family_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def for_model(self, lm: LanguageModel) -> Self:
        """The same method with every None replaced by the default of the model's family."""
        defaults = {**self.family_defaults.get("", {}), **self.family_defaults.get(family(lm) or "", {})}
        return replace(self, **{f.name: defaults[f.name] for f in fields(self) if getattr(self, f.name) is None and f.name in defaults})

    def objective(self, name: str) -> Objective:
        """The objective of that name with this method's own values."""
        return get_objective(name, **self.objective_defaults.get(name, {}))

    def to_dict(self) -> dict[str, Any]:
        """Name and hyper-parameters, ready for JSON."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """A session on `lm`; `objective` None is this method's cross-entropy. Raises ModelError if the method cannot edit the model."""

    def many(
        self, lm: LanguageModel, requests: Sequence[Sequence[Fact]], seeds: Sequence[int], objective: Objective | None = None
    ) -> list[Edit | FactError]:
        """Independent edits of the unedited model, one for each request: each what `start(lm, objective, seed).complete(facts)` gives.

        seeds: one for each request; torch's own generators are seeded with it too, and put back afterwards.
        An edit that cannot be made stands in the list as its FactError, so that the others do not suffer from it.

        Here one by one. Methods that override it optimise the edits side by side: the same up to rounding, whatever is in the batch.
        """
        return [alone(self, lm, facts, seed, objective) for facts, seed in zip(requests, seeds, strict=True)]


def alone(method: Method, lm: LanguageModel, facts: Sequence[Fact], seed: int, objective: Objective | None) -> Edit | FactError:
    """One edit of the unedited model by itself, or why it cannot be made."""
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            return method.start(lm, objective=objective, seed=seed).complete(facts)
        except FactError as error:
            return error


def encode_each(session: Session, requests: Sequence[Sequence[Fact]]) -> tuple[list[list[Encoded]], list[int], dict[int, Edit | FactError]]:
    """(the encoded facts of each request that has them, the numbers of these, number -> what is wrong with one of the others)."""
    texts: list[list[Encoded]] = []
    there: list[int] = []
    wrong: dict[int, Edit | FactError] = {}
    for number, facts in enumerate(requests):
        try:
            if not facts:
                raise FactError("there is nothing to edit; give at least one fact")
            texts.append([session.encode(fact) for fact in facts])
            there.append(number)
        except FactError as error:
            wrong[number] = error
    return texts, there, wrong


class Session(ABC):
    """One run of a method over a model: edits come out, and what the method carries from edit to edit stays in.

    watch: who looks on while an edit is trained, None for nobody. Editors that train weights call it. Locate-then-edit editors do not:
    what they optimise is a value at one token of one prompt, which says nothing of other prompts until it is written.
    """

    watch: Watch | None = None

    def __init__(self, lm: LanguageModel, method: Method, objective: Objective | None, seed: int) -> None:
        self.lm = lm
        self.method = method
        self.objective = objective or method.objective("ce")
        self.seed = seed
        self.count = 0

    def edit(self, facts: Sequence[Fact]) -> Edit:
        """An edit that makes `facts` true together; the model is left as it was.

        In a sequence the edits add up: each is made for the model with the session's earlier edits applied.

        Raises FactError if a fact cannot be edited (no fact, no tokens), ValueError if the objective does not fit.
        """
        edit = self._from(facts)
        self.remember(edit)
        return edit

    def propose(self, facts: Sequence[Fact]) -> Edit:
        """`complete`, but nothing is remembered of it, until `remember` is told that it stays. Raises what `edit` raises."""
        edit = self._from(facts)
        with edit.applied_():
            last = self.finish()
        if not last:
            return edit
        said = (edit.facts, edit.method, edit.objective, edit.diagnostics)
        return Edit(self.lm, [*edit.deltas, *last], *said, edit.keys, edit.memory, trail=edit.trail)

    def _from(self, facts: Sequence[Fact]) -> Edit:
        if not facts:
            raise FactError("there is nothing to edit; give at least one fact")
        return self._edit(list(facts))

    @abstractmethod
    def _edit(self, facts: list[Fact]) -> Edit: ...

    def remember(self, edit: Edit) -> None:
        """What is carried on from an edit that is made to the next one. It comes from the edit alone, so that `resume` can do it again."""
        self.count += 1

    def resume(self, edits: Sequence[Edit]) -> None:
        """Go on from the edits that are applied, in their order: the next one is that of the session that made them.

        Edits of other methods, settings or objectives are passed over. Where some of an earlier session's are left out (undone, and so not
        applied), this one goes on as if they had never been remembered.
        """
        for place in self.own(edits):
            self.remember(edits[place])

    def own(self, edits: Sequence[Edit]) -> list[int]:
        """The places of those edits that a session like this one made: of this method, its settings and its objective."""
        settings = _plain([self.method.to_dict(), self.record()])
        return [place for place, edit in enumerate(edits) if _plain([edit.method, edit.objective]) == settings]

    def finish(self) -> list[Delta]:
        """What the method does once, at the end of a sequence (PRUNE), with the session's edits in the model; changes nothing itself."""
        return []

    def complete(self, facts: Sequence[Fact]) -> Edit:
        """A sequence of one: `edit`, and what `finish` adds to it, as one edit. Raises what `edit` raises."""
        edit = self.propose(facts)
        self.remember(edit)
        return edit

    def state_dict(self) -> dict[str, Any]:
        """What must be kept for the sequence to go on as if it had not stopped."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.count = int(state["count"])

    def encode(self, fact: Fact) -> Encoded:
        """Prompt and target as tokens. Raises FactError where the tokenizer sees nothing in one of them."""
        try:
            encoded = encode(self.lm.tokenizer, fact.text, fact.target)
        except ValueError as error:
            raise FactError(str(error)) from error
        if not encoded.target_ids:
            raise FactError(f"the target {fact.target!r} has no tokens in {self.lm.name}; write another answer")
        check_length(self.lm, fact, [encoded])
        return encoded

    def record(self) -> dict[str, Any] | None:
        """The objective as it stands in an edit: name and settings; None where nothing is optimised."""
        if not self.method.optimises:
            return None
        return {"name": self.objective.name, **asdict(self.objective)}  # type: ignore[call-overload]  # objectives are dataclasses


def _plain(value: Any) -> str:
    """As it stands in a file, where a tuple is a list."""
    return json.dumps(value, sort_keys=True)
