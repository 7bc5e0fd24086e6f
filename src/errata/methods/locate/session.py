"""What the locate-then-edit editors share: their settings, and one edit from facts to deltas.

An editor of this kind is (1) a search for the value, (2) a write rule from keys to activation vectors β, and (3) what becomes of
Δ = r βᵀ. A method file says these three and nothing else.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from errata.edits.delta import Delta, DenseDelta, LowRankDelta, master_dtype
from errata.edits.edit import Edit
from errata.edits.errors import EditError
from errata.edits.stack import Stack
from errata.facts import Fact, FactError
from errata.lm.anatomy import is_conv1d
from errata.lm.capture import submodule
from errata.lm.errors import ModelError
from errata.lm.loading import refuse_uneditable
from errata.methods.base import Method, Session, check_range
from errata.methods.locate.contexts import prefixes, request
from errata.methods.locate.ridge import Prior, Ridge, inverse_prior
from errata.methods.locate.sweep import Reached, Sweep
from errata.methods.locate.trail import beginning, follow, recall, trail
from errata.methods.locate.value import Search, Values, find_values
from errata.statistics.errors import StatisticsError
from errata.statistics.moments import Moments, moments_for

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.objectives.base import Objective

TOGETHER = 32
"""So many facts are looked at in one pass."""

Writes = list[tuple[int, Tensor, Tensor]]
"""(layer, keys [F, d_in], residuals [F, d]) of one edit, from low to high."""


@dataclass(frozen=True)
class Locate(Method):
    """The settings of every locate-then-edit editor; see `Search` for those of the value.

    layers: the critical layers, from low to high; the value is found at the last. None: the family's, else (up to) five that end
        at three tenths of the depth; in post-norm models that one alone (see `for_model`).
    steps, lr, decay, clamp, kl, stop, enough: the search for the value.
    prefixes, prefix_length: so many texts of so many tokens, written by the model, stand before the prompt in its further contexts.
    corpus, tokens: the text whose second moments say what must not move, and how much of it; see `errata.statistics.moments_for`.
    """

    #: Whether an edit is its value and its write, and nothing that a session does before or after.
    together: ClassVar[bool] = True
    objective_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ce": {"reduction": "mean"},
        "overtone": {"epsilon": 0.05, "n_sigma": 0.5, "lam": 0.1, "reduction": "mean"},  # nobody has published values for this
    }

    layers: tuple[int, ...] | None = None
    steps: int | None = None
    lr: float | None = None
    decay: float | None = None
    clamp: float | None = None
    kl: float = 0.0625
    stop: float = 5e-2
    enough: float | None = None
    prefixes: int = 5
    prefix_length: int = 10
    corpus: str | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_range(self.name, "steps", self.steps, 1)
        check_range(self.name, "lr", self.lr, 0, above=True)
        for name in ("decay", "kl", "stop", "prefixes"):
            check_range(self.name, name, getattr(self, name), 0)
        check_range(self.name, "clamp", self.clamp, 0, above=True)
        check_range(self.name, "enough", self.enough, 0, 1, above=True)
        check_range(self.name, "prefix_length", self.prefix_length, 1)
        check_range(self.name, "tokens", self.tokens, 1)
        for name, hint in get_type_hints(type(self)).items():
            options = [o for part in (hint, *get_args(hint)) if get_origin(part) is Literal for o in get_args(part)]
            if options and getattr(self, name, None) not in (*options, None):
                known = " or ".join(map(repr, options))
                raise ValueError(f"{self.name}: {name} must be {known}, got {getattr(self, name)!r}")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"{self.name}: layers must be numbers from low to high, each once, got {list(self.layers)}")

    def for_model(self, lm: LanguageModel) -> Self:
        """The same method with every None replaced by the default of the model's family.

        Raises ModelError for a layer that is not there, and for several layers in a post-norm model: there a norm comes between the
        down-projection and the residual stream, so a value cannot be shared out over layers by differences of hidden states. One layer,
        its value taken at the down-projection's own output, is exact.
        """
        chosen = super().for_model(lm)
        count, straight = len(lm.anatomy.layers), lm.anatomy.writes_straight
        last = max(0, min(count - 2, round(0.3 * count)))
        layers = chosen.layers or tuple(range(max(0, last - 4) if straight and self.spreads else last, last + 1))
        if missing := [layer for layer in layers if not 0 <= layer < count]:
            raise ModelError(f"{lm.name} has layers 0 to {count - 1}, not {missing[0]}; choose among these for {self.name}")
        if len(layers) > 1 and not self.spreads:
            raise ModelError(f"{self.name} writes into one layer, got {list(layers)}; give one, for instance layers=[{layers[-1]}]")
        if len(layers) > 1 and not straight:
            raise ModelError(
                f"{lm.name} ({lm.anatomy.family}) has a norm between its MLPs and the residual stream: {self.name} cannot share one out "
                f"over layers {list(layers)}; give one, for instance layers=[{layers[-1]}]"
            )
        return replace(chosen, layers=layers)

    @property
    def spreads(self) -> bool:
        """Whether the value is shared out over several layers (ROME's is not)."""
        return True

    @property
    def search(self) -> Search:
        """The part of the settings that is about the value. Only after `for_model`."""
        assert self.steps is not None and self.lr is not None and self.decay is not None and self.clamp is not None
        return Search(self.steps, self.lr, self.decay, self.clamp, self.kl, self.stop, self.enough)

    def start(self, lm: LanguageModel, objective: Objective | None = None, seed: int = 0) -> Session:
        """See `Method.start`. Collects second moments and prefixes of the *unedited* model where they are not cached yet."""
        chosen = self.for_model(lm)
        refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[layer]}.weight" for layer in chosen.layers or ()])
        return chosen.session(lm, objective, seed)

    def many(
        self, lm: LanguageModel, requests: Sequence[Sequence[Fact]], seeds: Sequence[int], objective: Objective | None = None
    ) -> list[Edit | FactError]:
        """See `Method.many`. The values, which take the time, are looked for together; each edit is then written by itself."""
        if len(requests) < 2 or not self.together:
            return super().many(lm, requests, seeds, objective)
        session = self.start(lm, objective)
        assert isinstance(session, LocateSession)
        return session.many(requests)

    @abstractmethod
    def session(self, lm: LanguageModel, objective: Objective | None, seed: int) -> Session:
        """A session of this method, every setting filled in."""


class LocateSession(Session):
    """Facts to deltas: contexts, value, then layer by layer key, residual, write. Subclasses say how a write is solved and shaped."""

    method: Locate

    def __init__(self, lm: LanguageModel, method: Locate, objective: Objective | None, seed: int) -> None:
        super().__init__(lm, method, objective, seed)
        assert method.layers is not None  # for_model filled them in
        self.layers = method.layers
        self.prefixes = prefixes(lm, method.prefixes, method.prefix_length)
        self.device = lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[method.layers[-1]]).device
        self.ridges: dict[int, Ridge] = {layer: self.ridge(layer) for layer in self.layers}
        # Where keys are kept: what all that is in the write rules and the model by now is called, and the facts that are remembered.
        # looked: nothing was remembered since the keys were looked at again.
        self.lineage = self._beginning() if self.keeps else ""
        self.facts: list[Fact] = []
        self.looked = False

    @cached_property
    def moments(self) -> Moments:
        """Second moments of the unedited model's keys at the critical layers. Raises StatisticsError where they say too little."""
        with Stack.of(self.lm).aside_():
            moments = moments_for(self.lm, self.layers, corpus=self.method.corpus, tokens=self.method.tokens)
        if moments.count < moments.width:
            raise StatisticsError(
                f"{moments.count} tokens say nothing about most of the {moments.width} dimensions of a key, so {self.method.name} cannot "
                f"know what must not move; give it more text (corpus=FILE, or tokens above {moments.width}; ten times as many are usual)"
            )
        return moments

    def inverse(self, layer: int) -> Prior:
        """k -> C⁻¹k at a layer. The factor is found once for each model and statistics, and hangs on the model."""
        kept: dict[tuple[Any, ...], Prior] = vars(self.lm.model).setdefault("errata_factors", {})
        moments = self.moments
        where = (moments.fingerprint, moments.pieces, moments.count, layer)
        if where not in kept:
            kept[where] = inverse_prior(moments.mean(layer).to(self.device))
        return kept[where]

    @property
    def keeps(self) -> bool:
        """Whether the keys of earlier edits stay in the sums (AlphaEdit's K_p; MEMIT with history)."""
        return False

    @abstractmethod
    def ridge(self, layer: int) -> Ridge:
        """The write rule of a layer at the beginning of a sequence."""

    def key(self, contexts: Tensor) -> Tensor:
        """[F, C, d_in] -> [F, d_in]: half the bare prompt's, half the mean behind the prefixes (MEMIT)."""
        bare = contexts[:, 0]
        return bare if contexts.shape[1] == 1 else (bare + contexts[:, 1:].mean(1)) / 2

    def values(self, sweep: Sweep | Reached, requests: list[Any]) -> Values:
        """δ at the last critical layer."""
        return find_values(self.lm, self.layers[-1], requests, sweep.reached, self.method.search, self.objective)

    def shape(self, layer: int, delta: LowRankDelta) -> Delta:
        """What becomes of Δ before it is written."""
        return delta

    def remember(self, edit: Edit) -> None:
        """Its keys stay in the sums, where they are kept: those that were solved with.

        Published code computes them once more on the edited model; but the key of a layer depends on the layers below it only, and what
        was written there was in place when the key was taken, so they are the same.
        """
        if self.keeps:
            recall(self.ridges, edit)
        super().remember(edit)
        if self.keeps:
            self.facts += edit.facts
            self.lineage = follow(self.lineage, edit)
            self.looked = False

    def resume(self, edits: Sequence[Edit]) -> None:
        """See `Session.resume`.

        What an edit adds to a write rule stands in it, for as long as it follows what it was made on. Where something else was in the
        model by then than is now, an edit of whichever method undone since, or other statistics were, the keys of all up to there are
        taken anew, in the model with the edits up to there: nobody has kept them, and these are the model's own. What comes behind
        follows that. So the write rules depend on the edits alone, in their order, and not on who has seen them come and go.

        Raises EditError where edits would have to be taken out for that and have been folded with others.
        """
        if not self.keeps:
            return super().resume(edits)
        own, lineage = self.own(edits), self.lineage
        places = {number: place for place, number in enumerate(own)}
        anew = 0 if self.looked and edits else None  # so many of the own ones, from the first on, are to be looked at
        for number, edit in enumerate(edits):
            if number in places and (edit.trail is None or edit.trail.after != lineage):
                anew = places[number] + 1
            lineage = follow(lineage, edit)
        if anew is not None:
            facts = [*self.facts, *(fact for number in own[:anew] for fact in edits[number].facts)]
            with Stack.of(self.lm).without_(edits[own[anew] :] if anew < len(own) else ()):
                ridges = self._looked_at(facts)
            self.ridges = {}  # what is remembered first is in the others
            for number in own[:anew]:
                self.remember(edits[number])
            self.ridges, self.looked = ridges, True
        for number in own[anew or 0 :]:
            self.remember(edits[number])
        self.lineage = lineage

    def _looked_at(self, facts: Sequence[Fact]) -> dict[int, Ridge]:
        """Write rules that remember the keys of these facts in the model as it is."""
        ridges = {layer: self.ridge(layer) for layer in self.layers}
        for start in range(0, len(facts), TOGETHER):
            requests = [request(self.lm, fact, self.prefixes) for fact in facts[start : start + TOGETHER]]
            before = Sweep(self.lm, requests, self.layers).before
            self._refuse_runaway(*before.values())
            try:
                for layer, ridge in ridges.items():
                    ridge.remember(self.key(before[layer]))
            except ArithmeticError as error:
                raise EditError(f"{self.method.name} cannot go on: {error}") from error
        return ridges

    def _beginning(self) -> str:
        """What a history is called that nothing is in: by the model, and the statistics under the write rules."""
        return beginning(self.lm.fingerprint, self.moments.fingerprint, self.moments.pieces, self.moments.count)

    def _edit(self, facts: list[Fact]) -> Edit:
        clock = Stopwatch()
        requests = [request(self.lm, fact, self.prefixes) for fact in facts]
        sweep = Sweep(self.lm, requests, self.layers)
        self._refuse_runaway(sweep.keys, sweep.reached)
        clock.lap("keys")
        values = self.values(sweep, requests)
        clock.lap("value")
        return self._written(facts, sweep, values, clock)

    def many(self, wanted: Sequence[Sequence[Fact]]) -> list[Edit | FactError]:
        """Independent edits of the model as it is; nothing is remembered of them. See `Method.many`."""
        made: dict[int, Edit | FactError] = {}
        asked: dict[int, list[Any]] = {}
        for number, facts in enumerate(wanted):
            try:
                if not facts:
                    raise FactError("there is nothing to edit; give at least one fact")
                asked[number] = [request(self.lm, fact, self.prefixes) for fact in facts]
            except FactError as error:
                made[number] = error
        clock = Stopwatch()
        sweeps = {number: Sweep(self.lm, own, self.layers) for number, own in asked.items()}
        if sweeps:
            begun = Reached(*(torch.cat([getattr(one, part) for one in sweeps.values()]) for part in ("reached", "outputs")))
            self._refuse_runaway(begun.reached, begun.outputs)
            found = self.values(begun, [one for own in asked.values() for one in own])
        share, first = clock.total / max(1, len(sweeps)), 0
        for number, sweep in sweeps.items():
            last = first + len(asked[number])
            values, first = found.of(slice(first, last)), last
            made[number] = self._written(list(wanted[number]), sweep, values, Stopwatch(value=share))
        return [made[number] for number in range(len(wanted))]

    def _written(self, facts: list[Fact], sweep: Sweep, values: Values, clock: Stopwatch) -> Edit:
        deltas, writes = self.write(sweep, values, clock)
        clock.lap("write")
        keys = {layer: key for layer, key, _ in writes}
        kept = trail(self.lineage, self.ridges, dict(zip(self.layers, deltas, strict=True)), keys) if self.keeps else None
        diagnostics = {
            "steps": int(values.steps.max()),
            "losses": values.losses,
            "probability": round(float(values.probability.mean()), 6),
            **self.diagnostics(),
            "seconds": clock.total,
            **{f"seconds_{stage}": seconds for stage, seconds in clock.stages.items()},
        }
        named = {self.lm.anatomy.mlp_down[layer]: key for layer, key in keys.items()}
        return Edit(self.lm, deltas, facts, self.method.to_dict(), self.record(), diagnostics, keys=named, trail=kept)

    def write(self, sweep: Sweep, values: Values, clock: Stopwatch) -> tuple[list[Delta], Writes]:
        """Share what is missing out over the layers (MEMIT eq. 20): at layer i of L a part 1 / (L − i) of what is missing then."""
        target = sweep.reached + values.delta  # z [F, d]
        deltas: list[Delta] = []
        writes: Writes = []
        for i, layer in enumerate(self.layers):
            key = self.key(sweep.keys)
            residual = self.residual(i, (target - sweep.reached) / (len(self.layers) - i))
            clock.lap("keys")
            delta = self.shape(layer, self.delta(layer, key, residual))
            clock.lap("write")
            deltas.append(delta)
            writes.append((layer, key, residual))
            sweep.write(partial(self.effect, delta))
        clock.lap("keys")
        return deltas, writes

    def residual(self, index: int, residual: Tensor) -> Tensor:
        """What is written at the layer of that index [F, d]."""
        return residual

    def delta(self, layer: int, key: Tensor, residual: Tensor) -> LowRankDelta:
        """Δ = Rᵀ β [d, d_in] for keys [F, d_in] and residuals R [F, d]."""
        return self.low_rank(layer, residual, self.solve(layer, key))

    def solve(self, layer: int, key: Tensor) -> Tensor:
        """β [F, d_in]. Raises EditError where the numbers have run away, or facts of one edit cannot be told apart."""
        self._refuse_runaway(key)
        try:
            return self.ridges[layer].solve(key)
        except ArithmeticError as error:
            raise EditError(f"{self.method.name} cannot go on: {error}") from error
        except ValueError as error:
            raise EditError(f"{self.method.name} cannot write these facts together: {error}") from error

    def _refuse_runaway(self, *tensors: Tensor) -> None:
        """A history must never take in what is not finite: it would spoil all later edits."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise EditError(f"hidden states of {self.lm.name} are not finite any more, after {self.count} edits; revert some of them")

    def low_rank(self, layer: int, residual: Tensor, beta: Tensor) -> LowRankDelta:
        """Δ = Rᵀ β as it is written: residuals R [F, d], activation vectors β [F, d_in]."""
        path = self.lm.anatomy.mlp_down[layer]
        dtype = master_dtype(self.lm.anatomy.weight(self.lm.model, path))
        self._refuse_runaway(residual, beta)
        # Copies that lie in memory as those do that are read from a file: how a product is rounded may depend on it.
        left, right = residual.to(dtype).T, beta.to(residual.device, dtype)
        return LowRankDelta(path, *(factor.clone(memory_format=torch.contiguous_format) for factor in (left, right)))

    def effect(self, delta: Delta, key: Tensor) -> Tensor:
        """Δ k for keys [.., d_in]."""
        if isinstance(delta, LowRankDelta):
            return (key.to(delta.right) @ delta.right.T) @ delta.left.T
        assert isinstance(delta, DenseDelta)
        stored = delta.tensor if is_conv1d(submodule(self.lm.model, delta.path)) else delta.tensor.T
        return key.to(stored) @ stored

    def diagnostics(self) -> dict[str, Any]:
        """What a method has to add; ready for JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the write rules remember, too."""
        ridges = {str(layer): ridge.state_dict() for layer, ridge in self.ridges.items()}
        facts = [fact.to_dict() for fact in self.facts]
        return super().state_dict() | {"ridges": ridges, "lineage": self.lineage, "looked": self.looked, "facts": facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        super().load_state_dict(state)
        for layer, ridge in self.ridges.items():
            ridge.load_state_dict(state["ridges"][str(layer)])
        self.lineage, self.looked = str(state["lineage"]), bool(state["looked"])
        self.facts = [Fact.from_dict(fact) for fact in state["facts"]]


class Stopwatch:
    """Seconds by stage. On an accelerator a stage is timed when its work is asked for, unless something waits for it."""

    def __init__(self, **before: float) -> None:
        """before: seconds that stages have taken already."""
        self.last = time.perf_counter()
        self.begun = self.last - sum(before.values())
        self.stages = dict(before)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return time.perf_counter() - self.begun
