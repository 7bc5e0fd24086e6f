"""The gate: a small battery after each edit; an edit that breaks a limit does not stay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import yaml

from errata.edits import EditError, Stack
from errata.facts import EditCase, FactError, check_text
from errata.lm import Encoded, encode
from errata.metrics import perplexity
from errata.metrics.teacher_forced import agreement, predict
from errata.statistics.corpus import beside, texts

if TYPE_CHECKING:
    from errata.lm import LanguageModel

ANSWER_TOKENS = 6
"""So far the unedited model's own answers are compared."""
TEXT_TOKENS = 64
"""So much of each held-out text is read: less than elsewhere, since it is read again after every edit."""


@dataclass(frozen=True)
class Limits:
    """What an edit must not break; see gate.yaml beside this file, which has the defaults. Shares and multiples, not per cent."""

    fact: float
    batch: float
    rephrasings: float
    locality: float
    locality_drop: float
    perplexity: float
    text: str | None
    prompts: tuple[str, ...]
    sentences: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path | None = None) -> Self:
        """The defaults, with what a YAML file changes of them. Raises EditError naming what is wrong with the file."""
        home = resources.files("errata.corrections") / "gate.yaml"
        values: dict[str, Any] = yaml.safe_load(home.read_text(encoding="utf-8"))
        if path is not None:
            try:
                own = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise EditError(f"{path} is no YAML file ({' '.join(str(error).split())}); see errata/corrections/gate.yaml") from error
            if not isinstance(own, Mapping):
                raise EditError(f"{path} must hold limits by name, got {type(own).__name__}; see errata/corrections/gate.yaml")
            if unknown := [name for name in own if name not in values]:
                raise EditError(f"{path}: there is no limit {unknown[0]!r}; known: {', '.join(values)}")
            values |= own
        for field in fields(cls):
            value, where = values[field.name], "" if path is None else f"{path}: "
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                    raise EditError(f"{where}{field.name} must be a number of at least 0, got {value!r}")
                if value > 1 and field.name != "perplexity":
                    raise EditError(f"{where}{field.name} is a share, at most 1, got {value!r}; write 0.9 for 90 per cent")
            elif field.name == "text":
                if value is not None and not (isinstance(value, str) and Path(value).is_file()):
                    raise EditError(f"{where}there is no file of text {value!r}")
            elif not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
                raise EditError(f"{where}{field.name} must be a list of texts, got {value!r}")
            else:
                values[field.name] = tuple(value)
        for text in (*values["prompts"], *values["sentences"]):
            try:
                check_text(text)
            except FactError as error:
                raise EditError(f"{path}: {error}") from error
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the SHA-256 of a file of text, so that equal records mean equal limits; `from_dict` reads it back."""
        digest = hashlib.sha256(Path(self.text).read_bytes()).hexdigest() if self.text else None
        return {**asdict(self), "text_sha256": digest}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote. Raises EditError where the file of text is gone, or another."""
        values: dict[str, Any] = {field.name: record[field.name] for field in fields(cls)}
        made = cls(**values | {name: tuple(values[name]) for name in ("prompts", "sentences")})
        if made.text and not (Path(made.text).is_file() and made.to_dict()["text_sha256"] == record["text_sha256"]):
            raise EditError(f"the held-out text {made.text!r} is no more what it was; give limits anew (--gate FILE, or --no-gate)")
        return made


class Ordinary(NamedTuple):
    """The model as it is on what is nobody's request. kept: a share for each of its own answers; perplexity: in the unedited model's."""

    kept: tuple[float, ...]
    perplexity: float


class Gate:
    """The battery over one model: what the unedited model says is asked once.

    Raises ModelError for a text that is too long for the model.
    """

    def __init__(self, lm: LanguageModel, limits: Limits) -> None:
        self.lm, self.limits = lm, limits
        with Stack.of(lm).aside_():
            self.answers = self._own_answers(limits.prompts)
            own = limits.sentences != Limits.read().sentences  # whoever writes sentences wants them read
            source = texts(limits.text) if limits.text else limits.sentences if own or not beside(lm) else texts(None, lm)
            self.texts = perplexity.held_out(lm, source, tokens=TEXT_TOKENS)
            if not self.texts and limits.text:
                raise EditError(f"{limits.text} holds no text to measure perplexity on; give paragraphs, or leave out text")
            self.perplexity = perplexity.perplexity(lm, self.texts)

    def measure(self, cases: Sequence[EditCase], ordinary: Ordinary | None = None) -> dict[str, float]:
        """The model as it is: on these requests, and on what is nobody's. What there is nothing to ask for is absent.

        "fact" is the least accuracy of a fact of a single request, "batch" the share of several requests that hold.
        ordinary: what `ordinary` gave for the model as it is, if that is known.
        """
        taken = self.taken(cases)
        measured = {"fact": taken[0]} if len(cases) == 1 else {"batch": fmean(one >= self.limits.fact for one in taken)}
        if rephrasings := [(probe.prompt, probe.answers[0]) for case in cases for probe in case.rephrases]:
            measured["rephrasings"] = fmean(one.accuracy for one in predict(self.lm, rephrasings))
        kept, now = ordinary or self.ordinary()
        if own := [prompt for case in cases for prompt in case.meta.get("locality", ())]:
            with Stack.of(self.lm).aside_():
                answers = self._own_answers(own)
            kept = (*kept, *self._kept(answers))
        return measured | ({"locality": fmean(kept)} if kept else {}) | ({"perplexity": now} if self.texts else {})

    def taken(self, cases: Sequence[EditCase]) -> list[float]:
        """For each request the least accuracy of its facts."""
        facts = [(fact.text, fact.target) for case in cases for fact in case.facts]
        found = iter(one.accuracy for one in predict(self.lm, facts))
        return [min(islice(found, len(case.facts))) for case in cases]

    def ordinary(self) -> Ordinary:
        """The part of `measure` that does not depend on the requests."""
        return Ordinary(self._kept(self.answers), perplexity.perplexity(self.lm, self.texts) / self.perplexity)

    def broken(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """The limits that an edit breaks, in words; empty if it may stay. before, after: what `measure` gave."""
        limits, said = self.limits, []
        for name in ("fact", "batch", "rephrasings", "locality"):
            if name in after and after[name] < getattr(limits, name):
                said.append(f"{name} {after[name]:.2f}, at least {getattr(limits, name):g}")
        if "locality" in after and before["locality"] - after["locality"] > limits.locality_drop:
            said.append(f"locality fell from {before['locality']:.2f} to {after['locality']:.2f}, at most by {limits.locality_drop:g}")
        if "perplexity" in after and not after["perplexity"] <= limits.perplexity:  # nor is it a number
            said.append(f"perplexity {after['perplexity']:.2f} times the unedited model's, at most {limits.perplexity:g}")
        return said

    def _kept(self, answers: Sequence[Encoded]) -> tuple[float, ...]:
        """For each the share of its tokens that the model as it is says too."""
        return tuple(agreement(said.target_ids, now) for said, now in zip(answers, self._predicted(answers), strict=True))

    def _own_answers(self, prompts: Iterable[str]) -> list[Encoded]:
        """Each prompt with what the model itself puts behind it, as ids."""
        read = [encode(self.lm.tokenizer, prompt) for prompt in prompts]
        for _ in range(ANSWER_TOKENS):  # token by token: the ids themselves, which text does not always give back
            nexts = self._predicted([Encoded((*one.ids, self.lm.pad_id), len(one.ids)) for one in read])
            read = [Encoded((*one.ids, *new), one.prompt_length) for one, new in zip(read, nexts, strict=True)]
        return read

    @torch.no_grad()
    def _predicted(self, encoded: Sequence[Encoded]) -> list[tuple[int, ...]]:
        """The likeliest token at each place of the targets."""
        if not encoded:
            return []
        given = self.lm.target_logits(self.lm.batch(encoded)).argmax(-1).tolist()
        return [tuple(row[: len(one.target_ids)]) for one, row in zip(encoded, given, strict=True)]
