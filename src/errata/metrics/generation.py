"""What the model writes by itself (EVALUATION §3): greedy decoding, no teacher, compared as text.

Decoding ends at the end token, at a line break or at a limit, never at the answer's length: an answer cut where the right one ends
hides that the model goes on with something else (Yang et al. 2025, "The mirage of model editing").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from errata.facts import EditCase, Probe
from errata.lm import LanguageModel, encode
from errata.lm.own import Within, mapped
from errata.metrics.normalise import contains, exact
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
    limits = [_limit(lm, probe, max_new_tokens) for probe in probes]
    texts: dict[int, str] = {}
    for limit in sorted(set(limits)):
        chosen = [i for i, own in enumerate(limits) if own == limit]
        prompts = [probes[i].prompt for i in chosen]
        texts |= zip(chosen, lm.generate(prompts, limit, batch_size=batch_size, within=mapped(within, chosen)), strict=True)
    return [
        Transcript(probe.prompt, probe.answers, texts[i], exact(texts[i], probe.answers), contains(texts[i], probe.answers))
        for i, probe in enumerate(probes)
    ]


def _limit(lm: LanguageModel, probe: Probe, limit: int) -> int:
    if limit < 1:
        raise ValueError(f"max_new_tokens is {limit}; leave room for at least one token")
    longest = max(len(encode(lm.tokenizer, probe.prompt, answer).target_ids) for answer in probe.answers)
    while limit < 2 * longest:
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
