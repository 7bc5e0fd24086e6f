"""Reading fields of records that other people wrote: the shapes that occur are accepted, a broken one is named.

An answer may be a string, a number, a list of aliases, or a list of lists of aliases. A group of probes may be a list of probes, one
probe, or columns (`{"prompt": [...], "ground_truth": [...]}`). Groups may stand in a mapping or in flat fields. Whatever has no answer
cannot be measured: such a probe is left out and its field listed in the case's `meta["unanswered"]`. Surrounding whitespace is
dropped everywhere: it would change how a prompt and its answer are cut into tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.facts import EditCase, Fact, FactError, Probe

SHORT_GROUPS = {
    "portability_r": "Reasoning",
    "portability_s": "Subject_Aliasing",
    "portability_l": "Logical_Generalization",
    "locality_rs": "Relation_Specificity",
    "locality_f": "Forgetfulness",
}
"""KnowEdit's groups as flat fields."""

TARGETS = ("target_new", "target")
ANSWERS = ("ground_truth", "answers", "answer", "target")
REPHRASES = ("rephrase_prompt", "rephrase", "rephrases", "rephrase_prompts", "paraphrase_prompts")


class DataError(FactError):
    """A data set that is missing, not recognised or broken; the message names the file, the record and the field."""


class Record:
    """One record with its place, so that every complaint can say where.

    place: "counterfact.json, record 3" (counted from 0, as in the JSON array) or "facts.jsonl, line 4" (counted from 1, as editors do).
    number: position among the file's records, from 0; the case's id where the record has none.
    path: the field that this object is the value of, "" for a whole record.
    """

    __slots__ = ("number", "path", "place", "raw", "unanswered")

    def __init__(self, raw: object, place: str, number: int, path: str = "") -> None:
        if not isinstance(raw, Mapping):
            raise DataError(f"{place}{f', field {path!r}' if path else ''}: expected a JSON object, got {type(raw).__name__}")
        self.raw: Mapping[str, Any] = raw
        self.place = place
        self.number = number
        self.path = path
        self.unanswered: list[str] = []

    def inside(self, field: str, value: object) -> Record:
        """The object that stands in `field`, as a record whose complaints name both."""
        return Record(value, self.place, self.number, field)

    def error(self, field: str, problem: str) -> DataError:
        """The error to raise about `field`."""
        return DataError(f"{self.place}, field {f'{self.path}.{field}'.removeprefix('.')!r}: {problem}")

    @property
    def id(self) -> str:
        for name in ("case_id", "id"):
            if isinstance(value := self.raw.get(name), str | int) and str(value).strip():
                return str(value)
        return str(self.number)

    # single values

    def first(self, names: Sequence[str]) -> tuple[str, Any]:
        """(field, value) of the first of `names` that the record has; (names[0], None) if it has none."""
        return next(((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None))

    def text(self, *names: str) -> str:
        """The text of the first of `names` that is there. Raises DataError where it is missing, blank or not text."""
        field, value = self.first(names)
        if value is None:
            raise self.error(field, "is missing" + (f" (looked for {', '.join(names)})" if len(names) > 1 else ""))
        return self.as_text(value, field)

    def as_text(self, value: object, field: str) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"expected text, got {type(value).__name__} {value!r:.60}")
        if not (text := value.strip()):
            raise self.error(field, "is empty")
        return text

    def as_answers(self, value: object, field: str) -> tuple[str, ...]:
        """Every answer in a string, a number, a list of aliases or a list of such lists; blanks and repetitions dropped, order kept."""
        return tuple(dict.fromkeys(self._answers(value, field)))

    def _answers(self, value: object, field: str) -> Iterator[str]:
        if isinstance(value, str):
            if text := value.strip():
                yield text
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(value)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._answers(item, f"{field}[{index}]")
        elif isinstance(value, Mapping) and "str" in value:  # the ROME and MQuAKE spelling: {"str": "Paris", "id": "Q90"}
            yield from self._answers(value["str"], f"{field}.str")
        elif value is not None:
            got = f"{type(value).__name__} {value!r:.60}"
            raise self.error(field, f"expected an answer (text, a list of aliases, or a list of such lists), got {got}")

    # an edit

    def fact(self, prompt: Sequence[str] = ("prompt",), target: Sequence[str] = TARGETS, truth: Sequence[str] = ("ground_truth",)) -> Fact:
        """The fact to edit, under the names that the format uses.

        Subject and old answer may be missing; of several answers the first is taken.
        """
        wanted, value = self.first(target)
        answers = self.as_answers(value, wanted)
        if not answers:
            raise self.error(wanted, "is missing or empty; an edit needs its new answer")
        subject = self.raw.get("subject")
        if not isinstance(subject, str | None):
            raise self.error("subject", f"expected text, got {type(subject).__name__} {subject!r:.60}")
        old_field, old = self.first(truth)
        return self.checked_fact(self.text(*prompt), (subject or "").strip(), answers[0], next(iter(self.as_answers(old, old_field)), None))

    def checked_fact(self, prompt: str, subject: str, target: str, truth: str | None) -> Fact:
        try:
            return Fact(prompt, subject, target, truth)
        except FactError as error:  # what is left: a slot without a subject
            raise self.error("prompt", str(error)) from error

    def rephrases(self, target: str, names: Sequence[str] = REPHRASES) -> tuple[Probe, ...]:
        """Other wordings of the edit prompt: one text, a list of texts, or a list of probes with answers of their own."""
        field, value = self.first(names)
        if value is None or value == "":
            return ()
        probes: list[Probe] = []
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{field}[{index}]" if isinstance(value, list) else field
            if isinstance(item, Mapping):
                probes += self.probes(item, place)
            else:
                probes.append(Probe(self.as_text(item, place), (target,)))
        return tuple(probes)

    # probes

    def probe(self, prompt: object, answer: object, field: str, answer_field: str) -> Iterator[Probe]:
        """The probe, or nothing where it has no answer."""
        text = self.as_text(prompt, field)
        if answers := self.as_answers(answer, answer_field):
            yield Probe(text, answers)
        else:
            self.unanswered.append(answer_field)

    def columns(self, prompts: object, answers: object, field: str, answer_field: str) -> Iterator[Probe]:
        """Probes of a prompt with its answer, or of a list of prompts with the list of their answers."""
        if not isinstance(prompts, list):
            yield from self.probe(prompts, answers, field, answer_field)
            return
        if not isinstance(answers, list) or len(answers) != len(prompts):
            have = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise self.error(answer_field, f"expected {len(prompts)} answers, one for each prompt in {field!r}, got {have}")
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            yield from self.probe(prompt, answer, f"{field}[{index}]", f"{answer_field}[{index}]")

    def probes(self, value: object, field: str) -> tuple[Probe, ...]:
        """The probes of one group, in any of its shapes."""
        if value is None:
            return ()
        if not isinstance(value, list | Mapping):
            raise self.error(field, f"expected a list of probes (prompt, ground_truth), got {type(value).__name__} {value!r:.60}")
        found: list[Probe] = []
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{field}[{index}]" if isinstance(value, list) else field
            if not isinstance(item, Mapping):
                raise self.error(place, f"expected a probe (prompt, ground_truth), got {type(item).__name__} {item!r:.60}")
            answer = next((name for name in ANSWERS if name in item), None)
            for needed, name in (("prompt", "prompt" if "prompt" in item else None), (ANSWERS[0], answer)):
                if name is None:
                    raise self.error(f"{place}.{needed}", f"is missing (the probe has {', '.join(map(str, item)) or 'no fields'})")
            assert answer is not None
            found += self.columns(item["prompt"], item[answer], f"{place}.prompt", f"{place}.{answer}")
        return tuple(found)

    def groups(self, kind: str, flat_name: str | None = None) -> dict[str, tuple[Probe, ...]]:
        """Groups of `kind` ("portability", "locality"): from its mapping, and from flat fields; a group without probes is left out.

        flat_name: name of the group that stands in `<kind>_prompt` and `<kind>_ground_truth`; `kind` itself by default.
        """
        groups: dict[str, tuple[Probe, ...]] = {}
        value = self.raw.get(kind)
        if isinstance(value, Mapping) and "New Question" in value:  # the MEND form with GPT-4's one-hop questions
            question, answer = value["New Question"], value.get("New Answer")
            groups["one_hop"] = tuple(self.probe(question, answer, f"{kind}.New Question", f"{kind}.New Answer"))
        elif isinstance(value, list) or (isinstance(value, Mapping) and "prompt" in value):
            groups[kind] = self.probes(value, kind)
        elif isinstance(value, Mapping):
            groups |= {str(name): self.probes(items, f"{kind}.{name}") for name, items in value.items()}
        elif value is not None:
            raise self.error(kind, f"expected groups of probes, got {type(value).__name__} {value!r:.60}")
        for field, prompts in self.raw.items():
            if field in SHORT_GROUPS and field.startswith(kind):
                groups[SHORT_GROUPS[field]] = self.probes(prompts, field)
            elif field.startswith(f"{kind}_") and field.endswith("prompt") and prompts not in (None, "", []):
                stem = field.removesuffix("prompt")
                name = stem.removeprefix(kind).strip("_") or flat_name or kind
                answers = next((stem + suffix for suffix in ANSWERS if stem + suffix in self.raw), None)
                if answers is None:
                    raise self.error(stem + ANSWERS[0], f"is missing beside {field!r}")
                groups[name] = tuple(self.columns(prompts, self.raw[answers], field, answers))
        return {name: probes for name, probes in groups.items() if probes}

    def meta(self, **entries: object) -> dict[str, Any]:
        """What else is worth keeping; call it last, it also lists the probes that were left out."""
        kept = {name: value for name, value in entries.items() if value is not None}
        return kept | ({"unanswered": list(self.unanswered)} if self.unanswered else {})

    def case(self, fact: Fact, flat_locality: str | None = None) -> EditCase:
        """`fact` with the record's rephrases, portability and locality under their common names."""
        rephrases, portability, locality = self.rephrases(fact.target), self.groups("portability"), self.groups("locality", flat_locality)
        return EditCase(self.id, (fact,), rephrases, portability, locality, meta=self.meta())
