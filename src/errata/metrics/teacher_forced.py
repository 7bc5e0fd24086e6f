"""Teacher-forced token accuracy (EVALUATION §1; the tables of OVERTONE; the convention of EasyEdit).

The model reads prompt and answer, and at each of the answer's tokens its arg-max is compared with the token that stands there:
the answer itself (reliability on the edit prompt, generality on its rephrasings, portability on what follows from the edit), or what
the *unedited* model put there (locality; the answer only says which positions count).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from errata.facts import EditCase, Probe
from errata.lm import Encoded, LanguageModel, encode_all
from errata.lm.asking import has_memory
from errata.lm.own import Within, mapped, within_of
from errata.lm.places import once
from errata.lm.resume import Below
from errata.metrics.summary import KINDS

BATCH_SIZE = 32
BATCH_TOKENS = 4096
"""A batch holds at most so many texts, and so many tokens with padding (one text at least)."""
CPU_PADDING, PADDING = 128, 1024
"""And on a CPU, or elsewhere, at most about so many tokens of padding: another call of the model costs less."""

Groups = Mapping[str, tuple[Probe, ...]]
Tokens = Mapping[str, Sequence[Sequence[int]]]
"""Group -> for each of its probes the arg-max tokens at the answer's positions."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What stands at an answer's positions and what the model puts there, two tuples of token ids; p: the probabilities of what stands
    there. All of equal length."""

    wanted: tuple[int, ...]
    given: tuple[int, ...]
    p: tuple[float, ...] = field(compare=False)  # rounding, which what stands in a batch together changes

    @property
    def accuracy(self) -> float:
        """Share of the tokens that the model gets right."""
        return agreement(self.wanted, self.given)


@dataclass(frozen=True, slots=True)
class CaseScore:
    """The accuracies of one case, as fractions.

    probes: kind -> group -> one value a probe. A kind or group without probes is absent. The edit prompts are the one group "edit"
    of reliability, the rephrasings the one group "rephrase" of generality.
    edits: the edit prompts token by token, in the order of the facts.
    """

    id: str
    probes: Mapping[str, Mapping[str, tuple[float, ...]]]
    edits: tuple[Prediction, ...]

    @property
    def groups(self) -> dict[str, dict[str, float]]:
        """Kind -> group -> mean over its probes."""
        return {kind: {name: fmean(values) for name, values in groups.items()} for kind, groups in self.probes.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Kind -> mean over its groups, each group counting once."""
        return {kind: fmean(groups.values()) for kind, groups in self.groups.items()}

    @property
    def flat(self) -> dict[str, list[float]]:
        """Kind -> all probes of all groups, for the flat mean."""
        return {kind: [value for values in groups.values() for value in values] for kind, groups in self.probes.items()}

    @property
    def reliability(self) -> float | None:
        return self.metrics.get("reliability")

    @property
    def generality(self) -> float | None:
        return self.metrics.get("generality")

    @property
    def portability(self) -> float | None:
        return self.metrics.get("portability")

    @property
    def locality(self) -> float | None:
        return self.metrics.get("locality")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record, as `summarise` reads it: id, the four means (None where there is nothing to measure), and the probes."""
        probes = {kind: {name: list(values) for name, values in groups.items()} for kind, groups in self.probes.items()}
        return {"id": self.id, **{kind: self.metrics.get(kind) for kind in KINDS}, "probes": probes}


def probes_of(case: EditCase) -> dict[str, Groups]:
    """Everything that is asked about a case: kind -> group -> probes, in the order in which it is reported."""
    edit = tuple(Probe(fact.text, (fact.target,)) for fact in case.facts)
    asked = {"reliability": {"edit": edit}, "generality": {"rephrase": case.rephrases}}
    asked |= {"portability": dict(case.portability), "locality": dict(case.locality)}
    there = {kind: {name: probes for name, probes in groups.items() if probes} for kind, groups in asked.items()}
    return {kind: groups for kind, groups in there.items() if groups}


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the places at which two sequences of equal length agree. ValueError if the lengths differ."""
    return fmean(a == b for a, b in zip(one, other, strict=True))


@torch.no_grad()  # not inference_mode: what the model caches meanwhile must stay fit for training
def predict(
    lm: LanguageModel,
    texts: Sequence[tuple[str, str]],
    batch_size: int = BATCH_SIZE,
    batch_tokens: int = BATCH_TOKENS,
    within: Within | None = None,
    below: Below | None = None,
) -> list[Prediction]:
    """What the model puts at each token of each (prompt, answer), in batches of like length, in the order of `texts`.

    within: entered around each batch, with the numbers of the texts that are its rows.
    below: texts that it knows begin where the edits can be felt; the others it learns. `within` must leave alone what is before that.
    Raises ValueError for a text without tokens, ModelError for one that is too long for the model.
    """
    encoded = encode_all(lm.tokenizer, texts)
    found: dict[int, Prediction] = {}
    # Layers in which all texts run with the same weights, and with nothing else.
    alike = len(lm.anatomy.layers) if within is None else below.layer if below else 0
    alike = alike if wide(lm) and not has_memory(lm) else 0
    for chosen in batches(lm, encoded, batch_size, batch_tokens):
        rows = [encoded[i] for i in chosen]
        batch = lm.batch(rows).without_last()
        ids, there = batch.input_ids, batch.attention_mask
        with within_of(within, chosen), below.running(rows) if below else nullcontext(), once(lm, ids, there, alike):
            inputs = {"input_ids": ids, "attention_mask": there, "use_cache": False}
            logits = lm.rows_at(batch.positions, batch.mask, spare=True, **inputs).float()  # [N, V], text by text
        targets = batch.targets[batch.mask].to(logits.device)[:, None]  # [N, 1]
        p = (logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)).exp()
        answers = zip(logits.argmax(-1).tolist(), p.tolist(), strict=True)
        for i in chosen:
            own = [next(answers) for _ in encoded[i].target_ids]
            found[i] = Prediction(encoded[i].target_ids, tuple(token for token, _ in own), tuple(likely for _, likely in own))
    return [found[i] for i in range(len(texts))]


def batches(
    lm: LanguageModel, encoded: Sequence[Encoded], batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
) -> Iterator[list[int]]:
    """Indices of `encoded`, texts of like length together; the same texts in another order give the same batches."""
    padding = CPU_PADDING if lm.device.type == "cpu" else PADDING
    chosen: list[int] = []
    tokens = 0
    for i in sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), encoded[i].ids)):
        longest = len(encoded[i].ids)  # the longest comes last
        whole = (len(chosen) + 1) * longest
        if chosen and (len(chosen) == batch_size or whole > batch_tokens or whole - longest - tokens > padding):
            yield chosen
            chosen, tokens = [], 0
        chosen.append(i)
        tokens += longest
    if chosen:
        yield chosen


def unedited(lm: LanguageModel, cases: Sequence[EditCase], batch_size: int = BATCH_SIZE, below: Below | None = None) -> dict[str, Tokens]:
    """Case id -> the arg-max tokens of `lm`, as it is, on the case's locality probes. Take it once, before the first edit, and keep it.

    JSON-ready. In half precision each case is asked by itself, about locality here and in `score_all`: there a text's logits depend on
    what is in the batch with it by enough to change an answer, and a model that has not moved must score 100.
    """
    groups = [cases] if wide(lm) else [[case] for case in cases]
    return {case.id: tokens for group in groups for case, tokens in zip(group, _locality(lm, group, batch_size, below=below), strict=True)}


def wide(lm: LanguageModel) -> bool:
    """Whether what stands in a batch together changes rounding only. In half precision it may change an answer."""
    return lm.is_wide


def _locality(
    lm: LanguageModel, cases: Sequence[EditCase], batch_size: int, within: Within | None = None, below: Below | None = None
) -> list[dict[str, list[list[int]]]]:
    asked = [probes_of(case).get("locality", {}) for case in cases]
    rows = [(number, probe) for number, groups in enumerate(asked) for probes in groups.values() for probe in probes]
    texts = [(probe.prompt, probe.answers[0]) for _, probe in rows]
    given = iter(predict(lm, texts, batch_size, within=mapped(within, [number for number, _ in rows]), below=below))
    return [{name: [list(next(given).given) for _ in probes] for name, probes in groups.items()} for groups in asked]


def score(lm: LanguageModel, case: EditCase, before: Mapping[str, Tokens] | None, batch_size: int = BATCH_SIZE) -> CaseScore:
    """The accuracies of one case; see `score_all`."""
    return score_all(lm, [case], before, batch_size)[0]


def score_all(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    before: Mapping[str, Tokens] | None,
    batch_size: int = BATCH_SIZE,
    within: Within | None = None,
    below: Below | None = None,
) -> list[CaseScore]:
    """The accuracies of cases that are measured on the same model, in their order.

    before: what `unedited` gave before the edits; None leaves locality out.
    within: where each case is measured on a model of its own: entered around each batch, with the number of the case that each row is
    about (`errata.edits.side_by_side`). Locality is then asked of all cases at once, too.
    below: see `predict`.
    In portability the best of a probe's aliases counts; in reliability, generality and locality only its first answer.

    Raises ValueError where `before` does not belong to the cases; what `predict` raises.
    """
    asked = [probes_of(case) for case in cases]
    answers = [
        ((index, kind, name, number), (probe.prompt, answer))
        for index, kinds in enumerate(asked)
        for kind, groups in kinds.items()
        for name, probes in groups.items()
        for number, probe in enumerate(probes)
        for answer in (probe.answers if kind == "portability" else probe.answers[:1])
        if kind != "locality"
    ]
    best: dict[tuple[int, str, str, int], float] = {}
    edits: list[list[Prediction]] = [[] for _ in cases]
    about = mapped(within, [place[0] for place, _ in answers])
    predictions = predict(lm, [text for _, text in answers], batch_size, within=about, below=below)
    for (place, _), prediction in zip(answers, predictions, strict=True):
        best[place] = max(best.get(place, 0.0), prediction.accuracy)
        if place[1] == "reliability":
            edits[place[0]].append(prediction)
    now: list[dict[str, list[list[int]]]] = []
    if before is not None:
        together = wide(lm) or within is not None
        now = _locality(lm, cases, batch_size, within, below) if together else [_locality(lm, [case], batch_size)[0] for case in cases]
    scores = []
    for index, (case, kinds) in enumerate(zip(cases, asked, strict=True)):
        values = {
            kind: {name: tuple(best[index, kind, name, number] for number in range(len(probes))) for name, probes in groups.items()}
            for kind, groups in kinds.items()
            if kind != "locality"
        }
        if before is not None and "locality" in kinds:
            values["locality"] = _unmoved(case, before, now[index])
        scores.append(CaseScore(case.id, values, tuple(edits[index])))
    return scores


def _unmoved(case: EditCase, before: Mapping[str, Tokens], now: Tokens) -> dict[str, tuple[float, ...]]:
    kept = before.get(case.id)
    if kept is None:
        raise ValueError(f"no outputs of the unedited model for case {case.id!r}; take unedited(lm, cases) before the edit")
    if {name: [len(row) for row in rows] for name, rows in kept.items()} != {
        name: [len(row) for row in rows] for name, rows in now.items()
    }:
        raise ValueError(
            f"the unedited outputs of case {case.id!r} belong to other probes or another tokenizer; take unedited(lm, cases) anew"
        )
    return {name: tuple(agreement(old, new) for old, new in zip(kept[name], rows, strict=True)) for name, rows in now.items()}
