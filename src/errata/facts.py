"""Facts and cases: the words every other room speaks in.

A *fact* is one statement that a model should complete in a certain way. A *case* is an edit request (one fact, or several that
belong together) with the probes that measure it. Nothing here knows about models, tokens or tensors.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SLOT = "{}"


class FactError(ValueError):
    """A fact, probe or record that cannot be used; the message says what is wrong, where, and the way out."""


def check_text(*texts: object) -> None:
    """Raise FactError for what is no text, or holds half of a surrogate pair (JSON can spell one, UTF-8 and tokenizers cannot)."""
    for text in texts:
        if not isinstance(text, str):
            raise FactError(f"{text!r} is no text")
        if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
            raise FactError(f"{text!a} holds {lone[0]!a}, which is half a character; write the whole one")


def prompt_key(prompt: str) -> str:
    """The same for prompts that differ in case, white space and ways to spell a letter alone."""
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement to be made true: `prompt` with `subject` in it is to be continued by `target`.

    prompt: text with `{}` where the subject stands ("The capital of {} is"), or plain text that contains the subject. Other
        braces are ordinary characters: the slot is filled by replacement, never by `str.format`.
    subject: what the fact is about; may be "" for methods that do not look for it (FT, LoRA).
    target: the new answer, without a leading space.
    ground_truth: the old answer where it is known.
    """

    prompt: str
    subject: str
    target: str
    ground_truth: str | None = None

    def __post_init__(self) -> None:
        check_text(self.prompt, self.subject, self.target, self.ground_truth or "")
        if not self.prompt.strip():
            raise FactError(f"the prompt of the fact about {self.subject!r} is empty; write what comes before the target")
        if not self.target.strip():
            raise FactError(f"the target of {self.prompt!r} is empty; write the new answer")
        if SLOT in self.prompt and not self.subject:
            raise FactError(f"the prompt {self.prompt!r} has a slot {{}} but no subject; give the subject")

    @property
    def text(self) -> str:
        """The prompt as the model sees it, subject filled in."""
        return self.prompt.replace(SLOT, self.subject, 1) if self.subject else self.prompt

    @property
    def subject_span(self) -> tuple[int, int]:
        """Characters [start, end) of the subject in `text`.

        With a slot the place is the slot's. Without one it is the last occurrence that stands as a whole word, else the last
        occurrence, in the subject's own spelling first, then ignoring case.

        Raises FactError if the subject does not occur.
        """
        if not self.subject:
            raise FactError(
                f"the fact {self.prompt!r} names no subject, which is needed here; mark it: 'The capital of {{France}} is -> Lyon'"
            )
        if SLOT in self.prompt:
            start = self.prompt.index(SLOT)
            return start, start + len(self.subject)
        for flags in (0, re.IGNORECASE):
            for pattern in (rf"(?<!\w){re.escape(self.subject)}(?!\w)", re.escape(self.subject)):
                if found := list(re.finditer(pattern, self.prompt, flags)):
                    return found[-1].span()
        raise FactError(f"subject {self.subject!r} does not occur in the prompt {self.prompt!r}; write {{}} where the subject stands")

    @classmethod
    def parse(cls, line: str) -> Fact:
        """Read `The capital of {France} is -> Lyon`.

        The subject stands in the first pair of braces; without braces it is "". Raises FactError without " -> " or a target.
        """
        prompt, arrow, target = line.rpartition("->")
        if not arrow:
            raise FactError(f"no '->' in {line!r}; write a fact as 'The capital of {{France}} is -> Lyon'")
        braces = re.search(r"\{([^{}]+)\}", prompt)
        subject = braces.group(1).strip() if braces else ""
        if braces:
            prompt = prompt[: braces.start()] + SLOT + prompt[braces.end() :]
        return cls(prompt.strip(), subject, target.strip())

    def __str__(self) -> str:
        prompt = self.prompt.replace(SLOT, "{" + self.subject + "}", 1) if self.subject else self.prompt
        return f"{prompt} -> {self.target}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping without empty fields."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """Build a fact from JSON. Accepts `target`, or the data sets' `target_new`; a target may be `{"str": …}` (MQuAKE)."""
        target = record.get("target", record.get("target_new"))
        target = target.get("str") if isinstance(target, Mapping) else target
        for name, value in (("prompt", record.get("prompt")), ("target", target)):
            if not isinstance(value, str):
                raise FactError(f"field {name!r} is missing or not text (got {value!r})")
        subject, truth = record.get("subject", ""), record.get("ground_truth")
        if not isinstance(subject, str):
            raise FactError(f"field 'subject' is not text (got {subject!r})")
        if isinstance(truth, list):
            truth = truth[0] if truth and isinstance(truth[0], str) else None
        return cls(str(record["prompt"]), subject, str(target), truth)


@dataclass(frozen=True, slots=True)
class Probe:
    """A question put to the model: full text of the prompt, and the answers that count (the first is the canonical one)."""

    prompt: str
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        check_text(self.prompt, *self.answers)
        if not self.prompt.strip() or not self.answers or not all(answer.strip() for answer in self.answers):
            raise FactError(f"a probe needs a prompt and at least one non-empty answer (got {self.prompt!r}, {list(self.answers)!r})")


@dataclass(frozen=True, slots=True)
class Question:
    """What the model is to answer in its own words (MQuAKE): answered if one of the answers stands in what it writes.

    wordings: the question in full, in one or several wordings; one that is answered is enough.
    answers: those that count; the first is the canonical one.
    hops: through how many facts the answer follows (1: it is asked for directly).
    edited: whether a fact of the case has part in the answer; not so for the other facts on the way of a multi-hop question.
    """

    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    hops: int = 1
    edited: bool = True

    def __post_init__(self) -> None:
        for name, texts in (("wording", self.wordings), ("answer", self.answers)):
            if not texts or not all(text.strip() for text in texts):
                raise FactError(f"a question needs at least one {name}, and none that is empty (got {list(texts)!r})")
        if self.hops < 1:
            raise FactError(f"a question needs at least one hop (got {self.hops}): {self.wordings[0]!r}")


@dataclass(frozen=True, slots=True)
class EditCase:
    """An edit request with what is asked about it afterwards.

    facts: applied together (one, except in MQuAKE).
    rephrases: other wordings of the edit prompts, answers = the new target (generality).
    portability: group name -> probes whose answers follow from the new fact.
    locality: group name -> probes that must not move; the answer says which positions are compared.
    neighbourhood: same relation, other subject, answered by the old object (CounterFact's specificity).
    questions: to be answered in the model's own words, about the facts and what follows from them (MQuAKE).
    """

    id: str
    facts: tuple[Fact, ...]
    rephrases: tuple[Probe, ...] = ()
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    neighbourhood: tuple[Probe, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if not self.facts:
            raise FactError(f"case {self.id!r} has no fact to edit")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` reads it back. Without questions it has no such field, as before there were any."""
        return {
            "id": self.id,
            "facts": [fact.to_dict() for fact in self.facts],
            "rephrases": [asdict(probe) for probe in self.rephrases],
            "portability": {name: [asdict(p) for p in probes] for name, probes in self.portability.items()},
            "locality": {name: [asdict(p) for p in probes] for name, probes in self.locality.items()},
            "neighbourhood": [asdict(probe) for probe in self.neighbourhood],
            "meta": dict(self.meta),
            **({"questions": [asdict(question) for question in self.questions]} if self.questions else {}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditCase:
        """Read what `to_dict` wrote."""

        def probes(items: Iterable[Mapping[str, Any]]) -> tuple[Probe, ...]:
            return tuple(Probe(item["prompt"], tuple(item["answers"])) for item in items)

        return cls(
            id=str(record["id"]),
            facts=tuple(Fact.from_dict(fact) for fact in record["facts"]),
            rephrases=probes(record.get("rephrases", ())),
            portability={name: probes(items) for name, items in record.get("portability", {}).items()},
            locality={name: probes(items) for name, items in record.get("locality", {}).items()},
            neighbourhood=probes(record.get("neighbourhood", ())),
            meta=record.get("meta", {}),
            questions=tuple(
                Question(tuple(item["wordings"]), tuple(item["answers"]), item.get("hops", 1), item.get("edited", True))
                for item in record.get("questions", ())
            ),
        )


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL file; blank lines are passed over.

    Raises FactError that names file and line where a line is not a JSON object or the file is not UTF-8.
    """
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text) if text else None
            except ValueError as error:
                raise FactError(f"{path}, line {number}: not valid JSON ({error}); each line must be one JSON object") from error
            if not text:
                continue
            if not isinstance(record, dict):
                raise FactError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
            yield number, record
