"""The metrics against benchmarks/reference.py: from the definitions, one text at a time, on the same model, records and edited weights.

Every value is compared with ==. A share of tokens is exact once the arg-max is the same, and that is the same as long as no two logits are
nearer to one another than rounding, which batches change. On atlas they never are, in float32. The small models have learned little or
nothing, so their logits lie close together: they run in float64.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from benchmarks.reference import Reference, accuracy_table, mean, probability_table
from errata import data, methods
from errata.bench.intervals import rounded
from errata.bench.run import evaluate
from errata.edits import Edit
from errata.facts import EditCase, Fact, Probe
from errata.lm import LanguageModel
from errata.metrics import probability, summarise, teacher_forced
from errata.metrics.summary import KINDS
from tests.families import language_model

FOLDER = Path(os.environ.get("ERRATA_DATA") or Path(__file__).resolve().parents[2] / ".." / "shared" / "data")
SMALL = [
    EditCase(
        "full",
        (Fact("The capital of {} is", "France", "Oslo, of course", "Paris, of old"),),
        (Probe("The town of France is", ("Oslo, of course",)), Probe("France:", ("Oslo",))),
        {"one": (Probe("The capital of Norway is", ("Rome", "Oslo.", "Stockholm")), Probe("Ada Byron", ("lives in Rome. She works",)))},
        {"a": (Probe("Bo Ek lives in", ("Stockholm. He is",)),), "b": (Probe("Question: where does Bo Ek live now", ("in a town",)),)},
        (Probe("The capital of Italy", ("is Rome, an old town",)), Probe("Norway:", ("Oslo",))),
    ),
    EditCase(
        "two facts",
        (Fact("Bo Ek works as", "", "a writer of programs", "a baker"), Fact("{} lives", "Ada Byron", "in Lyon")),
        locality={"a": (Probe("The capital of Japan is", ("Tokyo, a town on a river",)), Probe("Marie Curie worked in", ("Paris",)))},
    ),
    EditCase("bare", (Fact("The capital of", "", "Italy is Oslo"),)),
]


@pytest.fixture(scope="module")
def atlas() -> LanguageModel:
    return errata.load("atlas")


def edit_of(lm: LanguageModel, cases: Sequence[EditCase], **changes: Any) -> Edit:
    """All facts by one FT-M. changes: of its settings."""
    return errata.edit(lm, [fact for case in cases for fact in case.facts], method=replace(methods.get("ft-m"), **changes))


def same(lm: LanguageModel, cases: Sequence[EditCase], edit: Edit, batch_sizes: Sequence[int] = (32,)) -> tuple[list[Any], list[Any]]:
    """Compare everything, before the edit (of some cases) and after; what the reference found after it, (accuracies, shares)."""
    reference = Reference(lm.model, lm.tokenizer)
    local, originals = [reference.local(case) for case in cases], [reference.originals(case) for case in cases]
    for size in batch_sizes:
        kept, answers = teacher_forced.unedited(lm, cases, size), probability.unedited(lm, cases, size)
        assert [kept[case.id] for case in cases] == local
        assert [answers[case.id] for case in cases] == originals

    def now(cases: Sequence[EditCase]) -> tuple[list[Any], list[Any]]:
        accuracies = [reference.accuracies(case, before) for case, before in zip(cases, local, strict=False)]
        shares = [reference.probabilities(case, before) for case, before in zip(cases, originals, strict=False)]
        for size in batch_sizes:
            ours = [score.to_dict() for score in teacher_forced.score_all(lm, cases, kept, size)]
            assert [one["probes"] for one in ours] == accuracies
            for one, groups in zip(ours, accuracies, strict=True):
                assert one.items() >= {kind: mean([mean(group) for group in groups[kind].values()]) for kind in groups}.items()
            assert summarise(ours).items() >= accuracy_table(accuracies).items()
            ours = [score.to_dict() for score in probability.score_all(lm, cases, answers, size)]
            assert ours == [{"id": case.id, **found} for case, found in zip(cases, shares, strict=True)]
            assert probability.summarise(ours).items() >= probability_table(shares).items()
        return accuracies, shares

    now(cases[:3])
    with edit.applied_():
        return now(cases)


def values(accuracies: Sequence[Any], kind: str) -> list[float]:
    return [value for case in accuracies for group in case.get(kind, {}).values() for value in group]


def test_on_atlas(atlas: LanguageModel) -> None:
    cases = data.load("atlas", split="test")[:16]
    accuracies, shares = same(atlas, cases, edit_of(atlas, cases[:12]))  # the last four are not edited
    for kind in KINDS:
        assert 0 < mean(values(accuracies, kind)) < 1, kind
    assert {*values(accuracies, "portability")} - {0.0, 1.0}  # parts of an answer count, too
    for name in shares[0]:
        assert 0 < mean([found[name] for found in shares if found[name] is not None]) < 1, name


@pytest.mark.parametrize(("name", "number"), [("zsre", 2), ("counterfact", 1), ("wiki_counterfact", 2)])
def test_on_real_records(atlas: LanguageModel, name: str, number: int) -> None:
    try:
        cases = data.load(name, FOLDER, limit=number)
    except data.DataError as missing:
        pytest.skip(f"real data not here: {missing}")
    accuracies, _ = same(atlas, cases, edit_of(atlas, cases))
    assert 0 < mean([value for kind in KINDS for value in values(accuracies, kind)]) < 1


@pytest.mark.parametrize("name", ["learned", "gpt2", "llama", "qwen3-window"])
def test_on_small_models_whatever_the_padding(lm: LanguageModel, name: str) -> None:
    """Short and long texts in a batch: absolute positions, rotary ones, and windows must not see the padding."""
    learned = LanguageModel(copy.deepcopy(lm.model).double(), lm.tokenizer, name) if name == "learned" else None
    small = learned or language_model(name, bos=True, dtype=torch.float64)
    accuracies, _ = same(small, SMALL, edit_of(small, SMALL[:1], lr=0.01, steps=20), (1, 3, 32))
    found = [value for kind in KINDS for value in values(accuracies, kind)]
    assert 0 < mean(found) < 1 and {*found} - {0.0, 1.0}


def test_what_the_user_is_shown(atlas: LanguageModel) -> None:
    """`evaluate` asks case by case, before and after the edit: up to the digits that it shows, the reference's table."""
    cases = data.load("atlas", split="test")[:3]
    reference, edit = Reference(atlas.model, atlas.tokenizer), edit_of(atlas, cases)
    before = [reference.local(case) for case in cases]
    with edit.applied_():
        table = accuracy_table([reference.accuracies(case, kept) for case, kept in zip(cases, before, strict=True)])
    assert evaluate(atlas, cases, edit)["metrics"].items() >= rounded(table).items()


def test_a_mistake_would_be_seen(atlas: LanguageModel) -> None:
    """A reference that looks one place too early or too late gives other numbers."""
    case = data.load("atlas", split="test")[1]
    edit, right = edit_of(atlas, [case]), Reference(atlas.model, atlas.tokenizer)
    local, originals = right.local(case), right.originals(case)
    with edit.applied_():
        accuracies, shares = right.accuracies(case, local), right.probabilities(case, originals)
        for shift in (-1, 1):
            wrong = Reference(atlas.model, atlas.tokenizer, shift)
            assert wrong.accuracies(case, local) != accuracies
            assert wrong.probabilities(case, originals) != shares
