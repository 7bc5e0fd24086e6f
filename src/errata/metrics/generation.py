"""What the model writes by itself (EVALUATION §3): greedy decoding, no teacher, compared as text.

Decoding ends at the end token, at a line break or at a limit, never at the answer's length: an answer cut where the right one ends
hides that the model goes on with something else (Yang et al. 2025, "The mirage of model editing").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from errata.facts import EditCase, Fact, FactError, Probe
from errata.lm import LanguageModel, encode_all
from errata.lm.own import Within, mapped
from errata.metrics.framing import chats, framed, is_framed, negated, turn
from errata.metrics.normalise import begins, contains, exact, normalise
from errata.metrics.teacher_forced import BATCH_SIZE, probes_of

MAX_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Transcript:
    """One question and what came: the new text as the model wrote it, and whether it is, or contains, one of the answers."""

    prompt: str
    answers: tuple[str, ...]
    text: str
    exact: bool
    contains: bool


@dataclass(frozen=True, slots=True)
class GenerationScore:
    """The transcripts of one case; `exact` and `contains` are the shares of them, as fractions."""

    id: str
    transcripts: tuple[Transcript, ...]

    @property
    def exact(self) -> float:
        return fmean(transcript.exact for transcript in self.transcripts)

    @property
    def contains(self) -> float:
        return fmean(transcript.contains for transcript in self.transcripts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the value of a record's field "generation", as `summarise` reads it."""
        transcripts = [asdict(transcript) | {"answers": list(transcript.answers)} for transcript in self.transcripts]
        return {"exact": self.exact, "contains": self.contains, "transcripts": transcripts}


def ask(
    lm: LanguageModel,
    probes: Sequence[Probe],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    within: Within | None = None,
) -> list[Transcript]:
    """Put questions to the model; the transcripts in their order.

    max_new_tokens: the limit, doubled as often as it takes to leave room for twice the longest answer of a question (WikiBio's are
    whole sentences). Right answers are never out of reach, and wrong ones never cut to fit.
    within: entered around each batch, with the numbers of the questions that are its rows.
    """
    limits = _limits(lm, probes, max_new_tokens)
    texts: dict[int, str] = {}
    for limit in sorted(set(limits)):
        chosen = [i for i, own in enumerate(limits) if own == limit]
        prompts = [probes[i].prompt for i in chosen]
        texts |= zip(chosen, lm.generate(prompts, limit, batch_size=batch_size, within=mapped(within, chosen)), strict=True)
    return [
        Transcript(probe.prompt, probe.answers, texts[i], exact(texts[i], probe.answers), contains(texts[i], probe.answers))
        for i, probe in enumerate(probes)
    ]


def _limits(lm: LanguageModel, probes: Sequence[Probe], limit: int) -> list[int]:
    """`limit` for each of the probes, doubled where its answers ask for it."""
    if limit < 1:
        raise ValueError(f"max_new_tokens is {limit}; leave room for at least one token")
    longest = [0] * len(probes)
    numbers = [number for number, probe in enumerate(probes) for _ in probe.answers]
    texts = [(probe.prompt, answer) for probe in probes for answer in probe.answers]
    for number, text in zip(numbers, encode_all(lm.tokenizer, texts), strict=True):
        longest[number] = max(longest[number], len(text.target_ids))
    return [_doubled(limit, 2 * own) for own in longest]


def _doubled(limit: int, needed: int) -> int:
    while limit < needed:
        limit *= 2
    return limit


def score(lm: LanguageModel, case: EditCase, max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = BATCH_SIZE) -> GenerationScore:
    """What the model writes after the edit prompt (prompts, where the case has several facts)."""
    return score_all(lm, [case], max_new_tokens, batch_size)[0]


def score_all(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    within: Within | None = None,
) -> list[GenerationScore]:
    """The same for cases that are measured on the same model, in their order; or each on its own, which `within` sets up for the numbers
    of the cases that the rows of a batch are about (`errata.edits.side_by_side`)."""
    probes = [probes_of(case)["reliability"]["edit"] for case in cases]
    about = mapped(within, [number for number, own in enumerate(probes) for _ in own])
    transcripts = iter(ask(lm, [probe for own in probes for probe in own], max_new_tokens, batch_size, about))
    return [GenerationScore(case.id, tuple(next(transcripts) for _ in own)) for case, own in zip(cases, probes, strict=True)]


WAYS = ("plain", "qa", "question", "chat")
"""How an edit is asked for: its prompt as it stands; the prompt in the question-answer frame; the case's own rephrasings that are
questions, in a frame; the prompt as a user's turn, where there is a chat template."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came when an edit was asked for, in one of WAYS.

    prompt: with its frame, without the chat template. exact: the text is the new target and nothing more; contains: the target stands in
    it. alias: the target or one of `aliases` stands in it; None where the case knows of none.
    """

    prompt: str
    target: str
    aliases: tuple[str, ...]
    text: str
    exact: bool
    contains: bool
    alias: bool | None


@dataclass(frozen=True, slots=True)
class Leak:
    """What came behind a prompt where the new target does not belong.

    answers: what does belong there, as far as the case says. at_once: the text begins with the target; contains: it stands somewhere in it.
    """

    prompt: str
    target: str
    answers: tuple[str, ...]
    text: str
    at_once: bool
    contains: bool


@dataclass(frozen=True, slots=True)
class ExtendedScore:
    """What the model writes about one case, beyond `GenerationScore`.

    ways: one of WAYS -> the replies; a way in which nothing can be asked is absent.
    negation, leak: see `extended`; empty where the data do not allow it.
    """

    id: str
    ways: Mapping[str, tuple[Reply, ...]]
    negation: tuple[Leak, ...]
    leak: tuple[Leak, ...]

    @property
    def metrics(self) -> dict[str, float | None]:
        """Shares, as fractions; None where there is nothing to ask.

        <way>_exact, <way>_contains, <way>_alias: of the replies in that way (alias: of those that have aliases).
        negation: of the negated prompts, behind how many the text begins with the new target; negation_contains: in how many texts it
            stands. The lower the better; but "not Lyon but Vienna" has the target in it and is right, so the first counts.
        leak, leak_contains: the same of the prompts about the subject's other relations. Here too the lower the better, and a text that
            goes on after its answer may come to speak of the edit, rightly.
        """
        shares: dict[str, float | None] = {}
        for way in WAYS:
            replies = self.ways.get(way, ())
            shares[f"{way}_exact"] = _share([reply.exact for reply in replies])
            shares[f"{way}_contains"] = _share([reply.contains for reply in replies])
            shares[f"{way}_alias"] = _share([reply.alias for reply in replies if reply.alias is not None])
        for name, leaks in (("negation", self.negation), ("leak", self.leak)):
            shares[name] = _share([leak.at_once for leak in leaks])
            shares[f"{name}_contains"] = _share([leak.contains for leak in leaks])
        return shares

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the metrics, and all transcripts."""
        transcripts: dict[str, Sequence[Reply | Leak]] = {**self.ways, "negation": self.negation, "leak": self.leak}
        return {"id": self.id, **self.metrics, "transcripts": {name: [_plain(one) for one in some] for name, some in transcripts.items()}}


def summarise_extended(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Percentages over records that `ExtendedScore.to_dict` wrote: of each metric the mean over the cases that have it, or None."""
    names = dict.fromkeys(name for record in records for name in record if name not in ("id", "transcripts"))
    columns = {name: [record[name] for record in records if record.get(name) is not None] for name in names}
    return {name: 100 * fmean(values) if values else None for name, values in columns.items()}


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt of one fact. kind: one of WAYS, "negation" or "leak"."""

    number: int  # of the case
    kind: str
    prompt: str
    target: str
    answers: tuple[str, ...]  # aliases of the target in WAYS, what belongs there otherwise


def extended(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    chat: str = "auto",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    within: Within | None = None,
) -> list[ExtendedScore]:
    """What the model writes about cases that are measured on the same model, in their order; greedy and never cut to a target's length.

    The same fact in each of WAYS. A prompt that is in a frame already is not asked in "qa", as it would stand in two; where the prompt is
        a sentence to be finished, a small model may not know what to do with one in "qa", so see "question", where the case has one. "chat"
        is the prompt as a user's whole turn; there line breaks do not end the reply, only the end token and the limit.
    chat: "auto", "on" or "off", see `errata.metrics.framing`.
    aliases: further answers of the case's rephrasings, portability probes and one-hop questions whose first answer is the target.
    negation: the edit prompt, denied by `framing.negated` ("The capital of France is not"); the new target must not go on from there. And
        the case's own probes that deny it (KnowEdit's Forgetfulness: "The name of the position held by X, which is not TARGET, is").
    leak: the case's other locality and neighbourhood probes whose prompt names a fact's subject and not its target, and whose answers
        neither are the target nor contain it, nor stand in it: other relations of the subject, in which the new target is wrong. The
        edit's own prompt is none. (atlas, KnowEdit and ZsRE have such probes, CounterFact hardly any, ZsRE's MEND form none.)

    Ask the unedited model too: a share of leaks is what the edit did as far as it is higher than before.
    within: as in `score_all`. Raises ValueError for an unknown `chat`, "on" without a template, or less than one token; ModelError for a
    prompt that is longer than the model can take.
    """
    templated = chats(lm.tokenizer, chat)
    asked = [one for number, case in enumerate(cases) for one in _asked(number, case, templated)]
    limits = _limits(lm, [Probe(one.prompt, (one.target,)) for one in asked], max_new_tokens)
    texts: dict[int, str] = {}
    for turns, limit in sorted({(one.kind == "chat", limit) for one, limit in zip(asked, limits, strict=True)}):
        chosen = [i for i, one in enumerate(asked) if (one.kind == "chat", limits[i]) == (turns, limit)]
        prompts = [turn(lm.tokenizer, asked[i].prompt, chat) if turns else asked[i].prompt for i in chosen]
        about = mapped(within, [asked[i].number for i in chosen])
        texts |= zip(chosen, lm.generate(prompts, limit, not turns, batch_size, within=about), strict=True)
    scores: list[tuple[dict[str, list[Reply]], dict[str, list[Leak]]]] = [({}, {"negation": [], "leak": []}) for _ in cases]
    for i, one in enumerate(asked):
        ways, leaks = scores[one.number]
        if one.kind in WAYS:
            ways.setdefault(one.kind, []).append(_reply(one, texts[i]))
        else:
            found = begins(texts[i], [one.target]), contains(texts[i], [one.target])
            leaks[one.kind].append(Leak(one.prompt, one.target, one.answers, texts[i], *found))
    return [
        ExtendedScore(case.id, {way: tuple(replies) for way, replies in ways.items()}, tuple(leaks["negation"]), tuple(leaks["leak"]))
        for case, (ways, leaks) in zip(cases, scores, strict=True)
    ]


def _asked(number: int, case: EditCase, templated: bool) -> Iterator[_Asked]:
    for fact in case.facts:
        aliases = _aliases(case, fact.target)
        yield _Asked(number, "plain", fact.text, fact.target, aliases)
        if not is_framed(fact.text):
            yield _Asked(number, "qa", framed(fact.text, "qa"), fact.target, aliases)
        for probe in case.rephrases:
            if normalise(probe.answers[0]) == normalise(fact.target) and (is_framed(probe.prompt) or probe.prompt.rstrip().endswith("?")):
                question = probe.prompt if is_framed(probe.prompt) else framed(probe.prompt, "qa")
                yield _Asked(number, "question", question, fact.target, aliases)
        if templated:
            yield _Asked(number, "chat", fact.text, fact.target, aliases)
        if denied := negated(fact.text, _span(fact)):
            yield _Asked(number, "negation", denied, fact.target, ())
        for probe in _where_it_is_wrong(case, fact):
            if not contains(probe.prompt, [fact.target]):
                yield _Asked(number, "leak", probe.prompt, fact.target, probe.answers)
            elif contains(probe.prompt, [f"not {fact.target}"]):
                yield _Asked(number, "negation", probe.prompt, fact.target, probe.answers)


def _aliases(case: EditCase, target: str) -> tuple[str, ...]:
    """Other names of the target that the case knows."""
    probes = (*case.rephrases, *(probe for group in case.portability.values() for probe in group))
    questions = (question.answers for question in case.questions if question.hops == 1 and question.edited)
    known = (answers for answers in (*(probe.answers for probe in probes), *questions) if normalise(answers[0]) == normalise(target))
    return tuple(dict.fromkeys(name for answers in known for name in answers if normalise(name) != normalise(target)))


def _where_it_is_wrong(case: EditCase, fact: Fact) -> list[Probe]:
    """Probes about the fact's subject that are not to be answered by its target."""
    groups = (*case.locality.values(), case.neighbourhood)
    probes = dict.fromkeys(probe for group in groups for probe in group)  # a neighbour may stand in both
    own = {normalise(one.text) for one in case.facts}
    return [
        probe
        for probe in probes
        if fact.subject
        and contains(probe.prompt, [fact.subject])
        and normalise(probe.prompt) not in own
        and not any(contains(answer, [fact.target]) or contains(fact.target, [answer]) for answer in probe.answers)
    ]


def _span(fact: Fact) -> tuple[int, int] | None:
    try:
        return fact.subject_span
    except FactError:  # no subject, or it is not in the prompt
        return None


def _reply(asked: _Asked, text: str) -> Reply:
    found = contains(text, [asked.target])
    alias = found or contains(text, asked.answers) if asked.answers else None
    return Reply(asked.prompt, asked.target, asked.answers, text, exact(text, [asked.target]), found, alias)


def _share(values: Sequence[bool]) -> float | None:
    return fmean(values) if values else None


def _plain(one: Reply | Leak) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(one).items()}
