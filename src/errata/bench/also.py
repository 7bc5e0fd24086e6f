"""What a sequence measures beside its cases: the cost of its edits elsewhere, and what is written when they are asked for in other ways.

Each measurement is taken once of the unedited model and once at each checkpoint, with the same texts, and stands in the checkpoint's line
under its name: `before` and `after`. Their settings are given like a method's: `settings: {ability: {tasks: [cola, sst2]}}`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from errata.bench.folder import Record, write_whole
from errata.bench.plan import ALSO, Plan, PlanError, configure
from errata.corrections.gate import Limits
from errata.data import ENVIRONMENT, digest
from errata.data.atlas import corpus
from errata.disk import replacing
from errata.methods.base import check_range
from errata.metrics import ability, drift, fluency, generation, perplexity
from errata.statistics.corpus import beside, texts

if TYPE_CHECKING:
    from errata.facts import EditCase
    from errata.lm import LanguageModel


FRESH = 11
"""Seed of the bundled world's held-out documents: neither that of its training text, nor of its tokenizer's, nor of its statistics'."""


class About(NamedTuple):
    """What a measurement asks about: edited cases in their order, and prompts about subjects that no edit is about."""

    cases: Sequence[EditCase]
    elsewhere: Sequence[str]


@dataclass(frozen=True)
class Measurement:
    """at_end: it is taken at the last checkpoint only. by_seed: what the unedited model gives hangs on which cases are edited."""

    at_end: ClassVar[bool] = False
    by_seed: ClassVar[bool] = True

    def check(self, data_dir: Path | None) -> Measurement:
        """The measurement with where its data lies. Raises what is wrong with it before a model is loaded."""
        return self

    def take(self, lm: LanguageModel, about: About) -> Any:
        """What the model as it is gives: a tensor, or JSON-ready."""
        raise NotImplementedError  # of what only `check` makes ready (Ability knows no folder, Asked does)

    def tell(self, before: Any, after: Any, last: bool) -> Record:
        """What stands in the line."""
        return {"before": before, "after": after}


@dataclass(frozen=True)
class Perplexity(Measurement):
    """On the beginnings of held-out texts, which are those beside the model's weights, or the gate's sentences."""

    by_seed: ClassVar[bool] = False

    texts: int = perplexity.TEXTS
    tokens: int = perplexity.TOKENS

    def __post_init__(self) -> None:
        check_range("perplexity", "texts", self.texts, 1)
        check_range("perplexity", "tokens", self.tokens, 2)  # the first is predicted from nothing

    def take(self, lm: LanguageModel, about: About) -> float:
        return round(of_held_out(lm, self.texts, self.tokens), 6)


@dataclass(frozen=True)
class Ability(Measurement):
    """See `errata.metrics.ability.measure`; by: its variant; limit None: all tests."""

    by_seed: ClassVar[bool] = False

    tasks: tuple[str, ...] = tuple(ability.TASKS)
    by: Literal["probability", "generate"] = "probability"
    limit: int | None = ability.LIMIT

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"ability: tasks names none; there is {', '.join(ability.TASKS)}")
        check_range("ability", "limit", self.limit, 1)

    def check(self, data_dir: Path | None) -> Measurement:
        ability.check(self.tasks, data_dir, self.limit)
        return Asked(self.tasks, self.by, self.limit, data_dir)


@dataclass(frozen=True)
class Asked(Ability):
    """With where the tests lie."""

    data_dir: Path | None = None

    def digests(self) -> dict[str, str]:
        """Task -> sha256 of the file of its tests."""
        return {name: digest(ability.find(name, self.data_dir)) for name in self.tasks if name in ability.TASKS}

    def take(self, lm: LanguageModel, about: About) -> dict[str, ability.Scores]:
        return ability.measure(lm, self.tasks, self.by, self.limit, self.data_dir)


@dataclass(frozen=True)
class Drift(Measurement):
    """Of the hidden states of at most so many prompts about other subjects; at the last checkpoint with t-SNE's points."""

    prompts: int = drift.PROMPTS
    layer: int | None = None

    def __post_init__(self) -> None:
        check_range("drift", "prompts", self.prompts, 2)
        check_range("drift", "layer", self.layer, 0)

    def check(self, data_dir: Path | None) -> Measurement:
        if find_spec("sklearn") is None:
            raise ImportError("the picture of drift needs scikit-learn; install errata[plots]")
        return self

    def take(self, lm: LanguageModel, about: About) -> torch.Tensor:
        return drift.states(lm, about.elsewhere[: self.prompts], self.layer)

    def tell(self, before: Any, after: Any, last: bool) -> Record:
        return drift.measure(before, after) if last else drift.compare(before, after)


@dataclass(frozen=True)
class Fluency(Measurement):
    """Of what is written behind the edits' own prompts, the first so many of the sequence that are edited by then."""

    prompts: int = 50
    tokens: int = fluency.MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        check_range("fluency", "prompts", self.prompts, 1)
        check_range("fluency", "tokens", self.tokens, 1)

    def take(self, lm: LanguageModel, about: About) -> dict[str, Any]:
        prompts = list(dict.fromkeys(fact.text for case in about.cases for fact in case.facts))[: self.prompts]
        score = fluency.score_all(lm, prompts, self.tokens)
        return {prompt: [round(value, 4), text] for prompt, text, value in zip(prompts, score.texts, score.values, strict=True)}

    def tell(self, before: Any, after: Any, last: bool) -> Record:
        """The fluency of each prompt's text; the texts themselves at the end."""
        kept = [prompt for prompt in after if prompt in before]
        found = {when: [said[prompt][0] for prompt in kept] for when, said in (("before", before), ("after", after))}
        if not last:
            return found
        return found | {"texts": [{"prompt": prompt, "before": before[prompt][1], "after": after[prompt][1]} for prompt in kept]}


@dataclass(frozen=True)
class Extended(Measurement):
    """See `errata.metrics.generation.extended`: with frames, negated, and about the subject's other relations."""

    at_end: ClassVar[bool] = True

    chat: Literal["auto", "on", "off"] = "auto"
    tokens: int = generation.MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        check_range("extended", "tokens", self.tokens, 1)

    def take(self, lm: LanguageModel, about: About) -> dict[str, Any]:
        return {score.id: score.to_dict() for score in generation.extended(lm, about.cases, self.chat, self.tokens)}

    def tell(self, before: Any, after: Any, last: bool) -> Record:
        """Case -> before: the shares of the unedited model; after: the shares, and all transcripts."""
        shares = {case: {name: value for name, value in said.items() if name not in ("id", "transcripts")} for case, said in before.items()}
        return {case: {"before": shares[case], "after": {k: v for k, v in said.items() if k != "id"}} for case, said in after.items()}


KINDS: Mapping[str, type[Measurement]] = dict(
    zip(ALSO, (Perplexity, Ability, Drift, Fluency, Extended), strict=True),
)


def measurements(plan: Plan, data_dir: str | Path | None = None) -> dict[str, Measurement]:
    """What the plan wants, with its settings. Raises PlanError, AbilityError, ImportError for what could not be measured."""
    place = data_dir or os.environ.get(ENVIRONMENT)
    made = {name: configure(KINDS[name](), plan.settings.get(name, {}), name) for name in plan.also}
    return {name: one.check(Path(place) if place else None) for name, one in made.items()}


def elsewhere(everything: Sequence[EditCase], edited: Sequence[EditCase], seed: int) -> list[str]:
    """Factual prompts about subjects that no edit is about, in an order that the seed draws: the edits and other wordings of the data's
    other cases; where there are none, what should stay by the edited ones' own account. Raises PlanError where there is nothing at all."""
    subjects = {fact.subject for case in edited for fact in case.facts}
    others = [case for case in everything if not any(fact.subject in subjects for fact in case.facts)]
    prompts = [text for case in others for text in (*(fact.text for fact in case.facts), *(probe.prompt for probe in case.rephrases))]
    if not prompts:
        prompts = [probe.prompt for case in edited for group in (case.neighbourhood, *case.locality.values()) for probe in group]
    if not prompts:
        raise PlanError("drift needs prompts about what is not edited, and the data has none beside the sequence; leave out drift")
    prompts = list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(prompts)
    return prompts


def unedited(wanted: Mapping[str, Measurement], lm: LanguageModel, about: About, seed: int, folder: Path) -> dict[str, Any]:
    """What the unedited model gives, taken once a run, however often it is stopped."""
    stems = {name: f"also-{name}-{seed}" if one.by_seed else f"also-{name}" for name, one in wanted.items()}
    return {name: _kept(one, lm, about, folder / stems[name]) for name, one in wanted.items()}


def _kept(one: Measurement, lm: LanguageModel, about: About, path: Path) -> Any:
    """From the disk, where it is written first: whoever goes on compares with the same numbers."""
    if isinstance(one, Drift):
        path = path.with_suffix(".pt")
        if not path.exists():
            with replacing(path) as file:
                torch.save(one.take(lm, about), file)
        return torch.load(path, weights_only=True)
    path = path.with_suffix(".json")
    if not path.exists():
        with torch.random.fork_rng():  # the harness seeds torch
            write_whole(path, json.dumps(one.take(lm, about), ensure_ascii=False))
    return json.loads(path.read_text(encoding="utf-8"))


def measured(wanted: Mapping[str, Measurement], lm: LanguageModel, about: About, before: Mapping[str, Any], last: bool) -> Record:
    """Name -> what the line of a checkpoint says, of the model as it is."""
    with torch.random.fork_rng():
        return {name: one.tell(before[name], one.take(lm, about), last) for name, one in wanted.items() if last or not one.at_end}


def of_held_out(lm: LanguageModel, count: int = perplexity.TEXTS, tokens: int = perplexity.TOKENS) -> float:
    """Perplexity on text that no statistics were taken of, since MEMIT and its like protect what these hold: of the bundled model on fresh
    documents of its world, of others on the gate's sentences, or on the text beside their weights if there is one."""
    return perplexity.perplexity(lm, perplexity.held_out(lm, _fresh(lm), count, tokens))


def _fresh(lm: LanguageModel) -> Iterable[str]:
    if lm.name == "atlas":
        return fresh_documents()
    return texts(None, lm) if beside(lm) else Limits.read().sentences


@cache
def fresh_documents() -> tuple[str, ...]:
    """Of the bundled world, drawn as its training text was."""
    return tuple(corpus.sample(documents=64, seed=FRESH).strip().split("\n\n"))
