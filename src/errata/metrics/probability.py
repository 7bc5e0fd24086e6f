"""Probability metrics (DeltaEdit, Appendix A.2, eq. 25–30; EVALUATION §2): is the new answer on top, and is it likelier than the old one?

The new answer o is the case's target, the old one o_c what the *unedited model* itself says, not what the data set believes it says.
It is taken as the model's greedy tokens and scored as these tokens; it never goes through text. "Top": every token of the answer is
the arg-max, the tokens before it given. "Larger": its mean log-probability over its own tokens is the greater one, so that a long
answer is not unlikely for its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, harmonic_mean
from typing import Any

import torch
from torch import Tensor

from errata.facts import EditCase
from errata.lm import Encoded, LanguageModel, encode
from errata.lm.tokens import Batch
from errata.metrics.teacher_forced import BATCH_SIZE, batches

Ids = tuple[int, ...]
Originals = Mapping[str, Sequence[Sequence[int]]]
"""Of a case: "edit", "rephrase", "unrelated" -> for each of these prompts the unedited model's answer as token ids. JSON-ready."""

METRICS = ("efficacy", "generalization", "specificity")


@dataclass(frozen=True, slots=True)
class Probabilities:
    """The shares of one case's prompts for which it holds, as fractions; None where there is nothing to ask.

    top: the new answer is on top (edit prompts, rephrasings); on unrelated prompts the model's original answer still is.
    larger: the new answer is likelier than the original one; on unrelated prompts less likely. A prompt is left out where the two are
        no rivals: one is the other, or its beginning (the unedited model gives the new answer already, or cut short, its start).
    """

    id: str
    efficacy_top: float | None
    generalization_top: float | None
    specificity_top: float | None
    efficacy_larger: float | None
    generalization_larger: float | None
    specificity_larger: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record, as `summarise` reads it."""
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Probabilities) if field.name != "id")


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt, the answer on record (it says how many tokens of the unedited model's own answer count), and the new answer."""

    prompt: str
    recorded: str
    new: str


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a model thinks of an answer: all its tokens are the arg-max; mean log-probability of a token."""

    top: bool
    mean: float


def _questions(case: EditCase) -> dict[str, list[_Question]]:
    """What is asked about a case. Unrelated are its neighbours or, where it has none (ZsRE), all its locality probes.

    With several facts in a case an unrelated prompt is no one fact's; its rival is the first fact's new answer.
    """
    truths = {fact.target: fact.ground_truth for fact in case.facts}
    unrelated = case.neighbourhood or tuple(probe for probes in case.locality.values() for probe in probes)
    return {
        "edit": [_Question(fact.text, fact.ground_truth or fact.target, fact.target) for fact in case.facts],
        "rephrase": [_Question(probe.prompt, truths.get(new) or new, new) for probe in case.rephrases for new in probe.answers[:1]],
        "unrelated": [_Question(probe.prompt, probe.answers[0], case.facts[0].target) for probe in unrelated],
    }


def unedited(lm: LanguageModel, cases: Sequence[EditCase], batch_size: int = BATCH_SIZE) -> dict[str, Originals]:
    """Case id -> the greedy answers of `lm`, as it is, to all prompts. Take it once, before the first edit, and keep it.

    Each answer has as many tokens as the one on record: the fact's ground truth (its target where there is none), the probe's answer.
    An end token counts like any other.
    Raises ValueError for a text without tokens, ModelError for one that is too long for the model.
    """
    asked = {case.id: _questions(case) for case in cases}
    wanted: dict[str, dict[str, list[tuple[Ids, Ids]]]] = {}
    longest: dict[Ids, Ids] = {}  # neighbours are shared by many cases: each prompt is answered once, at the greatest length
    for case, kinds in asked.items():
        wanted[case] = {kind: [_prompt_and_record(lm, question) for question in questions] for kind, questions in kinds.items()}
        for prompt, record in (pair for pairs in wanted[case].values() for pair in pairs):
            longest[prompt] = max(record, longest.get(prompt, ()), key=len)
    said = greedy(lm, longest, batch_size)
    return {
        case: {kind: [list(said[prompt][: len(record)]) for prompt, record in pairs] for kind, pairs in kinds.items()}
        for case, kinds in wanted.items()
    }


def _prompt_and_record(lm: LanguageModel, question: _Question) -> tuple[Ids, Ids]:
    encoded = encode(lm.tokenizer, question.prompt, question.recorded)
    return encoded.prompt_ids, encoded.target_ids


@torch.no_grad()
def greedy(lm: LanguageModel, drafts: Mapping[Ids, Ids], batch_size: int) -> dict[Ids, Ids]:
    """Prompt -> as many greedy tokens as its draft has. Through the same call that scores them later, so that the unedited model agrees
    with itself.

    A draft is a guess, and saves time where it is right: one pass checks all of it, up to the first token that the model would not say.
    """
    said: dict[Ids, Ids] = dict.fromkeys(drafts, ())
    while open_ := [prompt for prompt, draft in drafts.items() if len(said[prompt]) < len(draft)]:
        texts = [Encoded(prompt + said[prompt] + drafts[prompt][len(said[prompt]) :], len(prompt + said[prompt])) for prompt in open_]
        for chosen in batches(lm, texts, batch_size):
            rows = lm.target_logits(lm.batch([texts[i] for i in chosen]).without_last()).argmax(-1).tolist()  # [B, Tm]
            for i, row in zip(chosen, rows, strict=True):
                for token, guess in zip(row, texts[i].target_ids, strict=False):  # rows are padded
                    said[open_[i]] += (token,)
                    if token != guess:
                        break
    return said


def score(lm: LanguageModel, case: EditCase, before: Mapping[str, Originals], batch_size: int = BATCH_SIZE) -> Probabilities:
    """The shares of one case; see `score_all`."""
    return score_all(lm, [case], before, batch_size)[0]


def score_all(
    lm: LanguageModel, cases: Sequence[EditCase], before: Mapping[str, Originals], batch_size: int = BATCH_SIZE
) -> list[Probabilities]:
    """The shares of cases that are measured on the same model, in their order.

    before: what `unedited` gave before the edits. In half precision two answers that are all but equally likely may change places with
    the company in a batch: an unedited model's specificity is then 100 up to such ties.
    Raises ValueError where `before` does not belong to the cases, or a text has no tokens, ModelError for a text that is too long.
    """
    rivals = [_rivals(lm, case, before) for case in cases]
    everything = ((prompt, answer) for kinds in rivals for pairs in kinds.values() for prompt, *two in pairs for answer in two)
    found = _read(lm, everything, batch_size)
    return [Probabilities(case.id, **_shares(kinds, found)) for case, kinds in zip(cases, rivals, strict=True)]


def _rivals(lm: LanguageModel, case: EditCase, before: Mapping[str, Originals]) -> dict[str, list[tuple[Ids, Ids, Ids]]]:
    """Kind -> for each prompt (its ids, the new answer, the original answer)."""
    kept, asked = before.get(case.id), _questions(case)
    if kept is None:
        raise ValueError(f"no answers of the unedited model for case {case.id!r}; take unedited(lm, cases) before the edit")
    if {kind: len(answers) for kind, answers in kept.items()} != {kind: len(questions) for kind, questions in asked.items()}:
        raise ValueError(f"the unedited answers of case {case.id!r} belong to other prompts; take unedited(lm, cases) anew")
    rivals: dict[str, list[tuple[Ids, Ids, Ids]]] = {}
    for kind, questions in asked.items():
        encoded = (encode(lm.tokenizer, question.prompt, question.new) for question in questions)
        rivals[kind] = [(e.prompt_ids, e.target_ids, tuple(old)) for e, old in zip(encoded, kept[kind], strict=True)]
    return rivals


def _shares(rivals: Mapping[str, Sequence[tuple[Ids, Ids, Ids]]], found: Mapping[tuple[Ids, Ids], _Reading]) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for metric, (kind, three) in zip(METRICS, rivals.items(), strict=True):
        # (what is to win, what is not to)
        duels = [(old, new) if kind == "unrelated" else (new, old) for _, new, old in three]
        readings = [(found[prompt, one], found[prompt, other]) for (prompt, *_), (one, other) in zip(three, duels, strict=True)]
        fair = [one[: len(other)] != other[: len(one)] for one, other in duels]
        shares[f"{metric}_top"] = _share([one.top for one, _ in readings])
        shares[f"{metric}_larger"] = _share([one.mean > other.mean for (one, other), ok in zip(readings, fair, strict=True) if ok])
    return shares


def _share(values: Sequence[bool]) -> float | None:
    return fmean(values) if values else None


@torch.no_grad()  # not inference_mode: what the model caches meanwhile must stay fit for training
def _read(lm: LanguageModel, asked: Iterable[tuple[Ids, Ids]], batch_size: int) -> dict[tuple[Ids, Ids], _Reading]:
    """(prompt, answer) -> what the model thinks of it. Every text runs once, whoever asks, and serves all answers that it can.

    An answer of one token is read where its prompt ends, so every text with that prompt serves it; the same holds for a longer one and
    the texts that go on with all its tokens but the last. New and old answer seldom take two texts, and pooled neighbours are shared.
    """
    answers: dict[Ids, set[Ids]] = {}
    for prompt, answer in asked:
        answers.setdefault(prompt, set()).add(answer)
    groups = [(prompt, group) for prompt, own in answers.items() for group in served_together(own)]
    texts = [Encoded(prompt + group[0], len(prompt)) for prompt, group in groups]
    found: dict[tuple[Ids, Ids], _Reading] = {}
    for chosen in batches(lm, texts, batch_size):
        batch = lm.batch([texts[i] for i in chosen])
        keys = [(row, groups[i][0], answer) for row, i in enumerate(chosen) for answer in groups[i][1]]
        readings = _tokens(lm, batch, [(row, answer) for row, _, answer in keys])
        for (_, prompt, answer), reading in zip(keys, readings, strict=True):
            found[prompt, answer] = reading
    return found


def served_together(answers: Iterable[Ids]) -> list[list[Ids]]:
    """Answers to one prompt in as few groups as it takes, so that the text of a group's first predicts every token of the others.

    That is where it begins with all of an answer's tokens but the last. Distinct answers of at least one token.
    """
    groups: list[list[Ids]] = []
    for answer in sorted(answers, key=lambda answer: (answer[:-1], answer), reverse=True):  # what goes on comes before what it goes on from
        if groups and groups[-1][0][: len(answer) - 1] == answer[:-1]:
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups


def _tokens(lm: LanguageModel, batch: Batch, answers: Sequence[tuple[int, Ids]]) -> list[_Reading]:
    """The readings of (row of the batch, answer), from one forward pass."""
    logits = lm.target_logits(batch.without_last())  # [B, Tm, V]
    places = [(row, column, token) for row, answer in answers for column, token in enumerate(answer)]
    rows, columns, ids = torch.tensor(places, device=logits.device).unbind(-1)  # [N] each
    top: list[bool] = (logits.argmax(-1)[rows, columns] == ids).tolist()
    norm = _log_total(logits)[rows, columns]
    log_p: list[float] = (logits[rows, columns, ids].to(norm.dtype) - norm).tolist()
    readings, start = [], 0
    for _, answer in answers:
        part = slice(start, start := start + len(answer))
        readings.append(_Reading(all(top[part]), fmean(log_p[part])))
    return readings


def _log_total(logits: Tensor) -> Tensor:
    """log Σ exp over the vocabulary [B, Tm], in float32 or better. Text by text: half precision is not widened for the whole batch."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.stack([row.to(wide).logsumexp(-1) for row in logits])


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Percentages over records that `Probabilities.to_dict` wrote.

    The six means, each over the cases that have it (None where none has), and
    score_top, score_larger: the harmonic mean of efficacy, generalization and specificity, of those that there are; 0 if one of them is.
    score: score_larger, the field's S (Meng et al. 2022, ROME).
    """
    columns: dict[str, float | None] = {}
    for name in COLUMNS:
        there = [record[name] for record in records if record.get(name) is not None]
        columns[name] = 100 * fmean(there) if there else None
    scores: dict[str, float | None] = {}
    for kind in ("top", "larger"):
        parts = [value for metric in METRICS if (value := columns[f"{metric}_{kind}"]) is not None]
        scores[f"score_{kind}"] = harmonic_mean(parts) if parts else None
    return columns | scores | {"score": scores["score_larger"]}
