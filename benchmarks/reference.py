"""The metrics from their definitions, slowly: what errata's evaluation is compared with, for its numbers (a test) and time (evaluation.py).

One text at a time: a forward pass of the whole text with all its logits, no batch, no padding, no cache, and a Python loop over the
answer's tokens. Of errata it takes the cases and nothing else: neither its encoding nor its metrics.

Teacher-forced token accuracy is EVALUATION §1 (OVERTONE's tables), top and larger are §2 (DeltaEdit, Appendix A.2, eq. 25–30).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

import torch
from torch import Tensor

from errata.facts import EditCase, Probe

Groups = dict[str, list[list[int]]]
"""Name -> for each of its prompts so many tokens."""
Accuracies = dict[str, dict[str, list[float]]]
"""Kind -> group -> for each of its probes the share of the answer's tokens."""
Shares = dict[str, float | None]
"""Metric -> share of the prompts for which it holds, None without prompts."""


@dataclass(frozen=True)
class Reference:
    """A causal LM and its tokenizer (transformers), measured as they are at each call.

    shift: 0 by the definition: token i of a text is predicted at place i - 1. Another number is a mistake, for a test to find.
    """

    model: Any
    tokenizer: Any
    shift: int = 0

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt as it is encoded alone, and those behind it in prompt + " " + answer."""
        head = self.tokenizer(prompt).input_ids
        whole = self.tokenizer(f"{prompt} {answer}").input_ids
        assert whole[: len(head)] == head, f"{prompt!r} and {answer!r} do not part at a token"
        return head, whole[len(head) :]

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] of one text of T tokens."""
        logits: Tensor = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[0]
        return logits

    def forced(self, head: list[int], target: list[int]) -> tuple[list[int], float]:
        """The arg-max at each of the target's tokens, those before it given, and the mean log-probability of these tokens."""
        logits, given, log_p = self.logits(head + target), [], []
        for i, token in enumerate(target):
            at = logits[len(head) + i - 1 + self.shift]  # [V]
            given.append(int(at.argmax()))
            log_p.append(float(at.log_softmax(-1)[token]))
        return given, mean(log_p)

    def given(self, probe: Probe) -> list[int]:
        """The arg-max at the tokens of a probe's first answer."""
        return self.forced(*self.encode(probe.prompt, probe.answers[0]))[0]

    def accuracy(self, prompt: str, answer: str) -> float:
        """Share of the answer's tokens that are the arg-max."""
        head, target = self.encode(prompt, answer)
        return agreement(target, self.forced(head, target)[0])

    def local(self, case: EditCase) -> Groups:
        """What the model puts at the answers of the locality probes; asked of the unedited model, it is what locality compares with."""
        return {name: [self.given(probe) for probe in probes] for name, probes in case.locality.items() if probes}

    def accuracies(self, case: EditCase, before: Groups) -> Accuracies:
        """Teacher-forced token accuracy. before: what `local` gave of the unedited model."""
        found: Accuracies = {"reliability": {"edit": [self.accuracy(fact.text, fact.target) for fact in case.facts]}}
        if case.rephrases:
            found["generality"] = {"rephrase": [self.accuracy(probe.prompt, probe.answers[0]) for probe in case.rephrases]}
        for name, probes in case.portability.items():
            if probes:
                best = [max(self.accuracy(probe.prompt, answer) for answer in probe.answers) for probe in probes]
                found.setdefault("portability", {})[name] = best
        for name, now in self.local(case).items():
            found.setdefault("locality", {})[name] = [agreement(old, new) for old, new in zip(before[name], now, strict=True)]
        return found

    def originals(self, case: EditCase) -> Groups:
        """o_c: the model's greedy answers, each of as many tokens as the one on record. Asked of the unedited model."""
        return {kind: [self._greedy(prompt, recorded) for prompt, recorded, _ in asked] for kind, asked in questions(case).items()}

    def _greedy(self, prompt: str, recorded: str) -> list[int]:
        head, target = self.encode(prompt, recorded)
        said: list[int] = []
        for _ in target:
            said.append(int(self.logits(head + said)[-1].argmax()))
        return said

    def probabilities(self, case: EditCase, before: Groups) -> Shares:
        """Top and larger. before: what `originals` gave of the unedited model."""
        found: Shares = {}
        for (kind, asked), metric in zip(questions(case).items(), ("efficacy", "generalization", "specificity"), strict=True):
            top, larger = [], []
            for (prompt, _, answer), old in zip(asked, before[kind], strict=True):
                head, new = self.encode(prompt, answer)
                wins, loses = (old, new) if metric == "specificity" else (new, old)
                (given, p), (_, q) = self.forced(head, wins), self.forced(head, loses)
                top.append(float(given == wins))
                shorter = min(len(wins), len(loses))
                if wins[:shorter] != loses[:shorter]:  # otherwise they are no rivals: one is the other, or its beginning
                    larger.append(float(p > q))
            found[f"{metric}_top"] = mean(top) if top else None
            found[f"{metric}_larger"] = mean(larger) if larger else None
        return found


def questions(case: EditCase) -> dict[str, list[tuple[str, str, str]]]:
    """Kind -> (prompt, answer on record, new answer). Without neighbours a case's unrelated prompts are its locality probes."""
    old = {fact.target: fact.ground_truth or fact.target for fact in case.facts}
    unrelated = case.neighbourhood or [probe for probes in case.locality.values() for probe in probes]
    return {
        "edit": [(fact.text, fact.ground_truth or fact.target, fact.target) for fact in case.facts],
        "rephrase": [(probe.prompt, old.get(probe.answers[0], probe.answers[0]), probe.answers[0]) for probe in case.rephrases],
        "unrelated": [(probe.prompt, probe.answers[0], case.facts[0].target) for probe in unrelated],
    }


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the places at which two lists of tokens agree."""
    assert len(one) == len(other) > 0
    return mean([float(a == b) for a, b in zip(one, other, strict=True)])


def accuracy_table(cases: Sequence[Accuracies]) -> Shares:
    """Per cent over cases: probes into groups, groups into cases, cases that have the kind into its column; and flat, over all probes."""
    table: Shares = {}
    for kind in ("reliability", "generality", "portability", "locality"):
        there = [case[kind] for case in cases if kind in case]
        flat = [value for groups in there for group in groups.values() for value in group]
        table[kind] = 100 * mean([mean([mean(group) for group in groups.values()]) for groups in there]) if there else None
        table[f"{kind}_flat"] = 100 * mean(flat) if flat else None
    table["average"] = mean([value for kind, value in table.items() if value is not None and not kind.endswith("_flat")])
    return table


def probability_table(cases: Sequence[Mapping[str, float | None]]) -> Shares:
    """Per cent over the cases that have the metric, and the harmonic mean of the three of a kind."""
    table: Shares = {}
    for name in cases[0]:
        there = [value for case in cases if (value := case[name]) is not None]
        table[name] = 100 * mean(there) if there else None
    for kind in ("top", "larger"):
        parts = [value for name, value in table.items() if name.endswith(kind) and value is not None]
        table[f"score_{kind}"] = harmonic_mean(parts) if parts else None
    return table
