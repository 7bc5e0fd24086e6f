"""Edits side by side: each row is what the model gives with its edit applied, and the weights are never touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata import data, methods
from errata.edits import DenseDelta, Edit, EditError, LowRankDelta, Replacement
from errata.edits.codebook import Books, CodeBook
from errata.edits.side_by_side import SideBySide, can_stand_beside, lowest
from errata.facts import Fact
from errata.lm import LanguageModel, encode
from errata.lm.anatomy import matrix
from errata.lm.capture import submodule
from errata.metrics import generation, teacher_forced
from tests.families import language_model

TEXTS = [("The capital of France is", "Paris"), ("Marie Curie was born in", "Warsaw, in Poland"), ("Lyon lies in", "France")]


def edits_of(lm: LanguageModel) -> list[Edit]:
    """Unlike ones: dense, low-rank of two ranks, both on one module, on other modules, nothing at all."""
    torch.manual_seed(1)
    down, other = lm.anatomy.mlp_down[1], lm.anatomy.mlp_down[2]

    def dense(path: str) -> DenseDelta:
        return DenseDelta(path, torch.randn_like(lm.model.get_parameter(f"{path}.weight"), dtype=torch.float64))

    def low(path: str, rank: int) -> LowRankDelta:
        out, width = matrix(submodule(lm.model, path)).shape
        return LowRankDelta(path, torch.randn(out, rank, dtype=torch.float64), torch.randn(rank, width, dtype=torch.float64))

    deltas = [[dense(down)], [low(down, 2), low(other, 1)], [dense(down), low(down, 3), dense(down)], []]
    return [Edit(lm, own, [Fact("{} is", "Lyon", "Paris")], {"name": "test"}) for own in deltas]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "olmo2"])
def test_each_row_is_that_of_its_edit(family: str) -> None:
    lm = language_model(family, dtype=torch.float64)
    edits = edits_of(lm)
    rows = [2, 0, 3, 1, 0, 2]
    encoded = [encode(lm.tokenizer, *TEXTS[row % 3]) for row in range(len(rows))]
    batch = lm.batch(encoded)
    plain = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    with torch.no_grad(), SideBySide(lm, edits).rows(rows):
        found = lm.target_logits(batch)
    assert all(torch.equal(parameter, plain[name]) for name, parameter in lm.model.named_parameters())
    for row, edit in enumerate(rows):
        with torch.no_grad(), edits[edit].applied_():
            expected = lm.target_logits(batch)[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)  # the norms compute in float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_lowest_layer_that_is_changed(family: str) -> None:
    lm = language_model(family)
    edits = edits_of(lm)
    assert [lowest(lm, [edit]) for edit in edits] == [(1, True), (1, True), (1, True), None]
    assert lowest(lm, edits) == (1, True)

    def of(*paths: str) -> Edit:
        return Edit(lm, [DenseDelta(path, torch.zeros(1, 1)) for path in paths], [], {})

    downs, attention = lm.anatomy.mlp_down, lm.anatomy.attn_out
    assert lowest(lm, [of(downs[3], downs[2])]) == lowest(lm, [of(downs[2], attention[3]), of(downs[3])]) == (2, True)
    assert lowest(lm, [of(downs[2]), of(attention[2])]) == (2, False)
    assert lowest(lm, [of(downs[2]), of(lm.anatomy.head)]) is None, "below it nothing can be kept"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "olmo2"])
def test_each_question_is_asked_of_its_own_code_book(family: str) -> None:
    """Each edit's own questions and the others', of books of one form and another, beside an edit that writes weights."""
    lm = language_model(family, dtype=torch.float64)
    asked_of = [("The capital of {} is", "France", "Lyon"), ("{} was born in", "Marie Curie", "Tokyo"), ("{} lies in", "Lyon", "Japan")]
    facts = [Fact(*one) for one in asked_of]
    melo = errata.MELO(layers=(2, 3), book=1, steps=30, lr=0.1, scale=1.0, radius=1e-3)
    edits = [melo.start(lm, seed=i).complete([fact]) for i, fact in enumerate(facts)]
    wide = replace(melo, rank=melo.rank + 1)  # a book that the others' blocks do not fit
    edits[1:1] = [melo.start(lm, seed=7).complete(facts)]  # several blocks before others
    edits += [wide.start(lm).complete(facts[:2]), edits_of(lm)[0]]
    asked = [(row, fact) for row in range(len(edits)) for fact in facts]
    rows = [row for row, _ in asked]
    batch = lm.batch([encode(lm.tokenizer, fact.text, fact.target) for _, fact in asked])
    prompts = [fact.text for _, fact in asked]
    beside = SideBySide(lm, edits)
    with torch.no_grad(), beside.rows(rows):
        found = lm.target_logits(batch)
    written = lm.generate(prompts, 8, within=lambda chosen: beside.rows([rows[i] for i in chosen]))
    plain = lm.generate([fact.text for fact in facts], 8)
    for row, edit in enumerate(edits):
        own = [i for i, (owner, _) in enumerate(asked) if owner == row]
        with torch.no_grad(), edit.applied_():
            torch.testing.assert_close(found[own], lm.target_logits(batch)[own], atol=1e-5, rtol=1e-5)  # the norms compute in float32
            assert [written[i] for i in own] == lm.generate([prompts[i] for i in own], 8)
        changed = [written[i] != plain[i % 3] for i in own]
        assert row == 5 or changed == [fact in edit.facts for fact in facts], "its own questions and no others"


def test_each_of_many_texts_that_end_early_keeps_its_code_book() -> None:
    """A memory has to know its questions until all of a batch have ended, also when it comes with the batch."""
    lm = errata.load("atlas", device="cpu")
    cases = data.load("atlas", split="dev")[:12]
    melo = errata.MELO(steps=8)
    edits = [melo.start(lm, seed=i).complete(case.facts) for i, case in enumerate(cases)]
    prompts = [case.facts[0].text for case in cases]
    written = lm.generate(prompts, 24, within=SideBySide(lm, edits).rows)
    for edit, prompt, ours in zip(edits, prompts, written, strict=True):
        with edit.applied_():
            assert lm.generate([prompt], 24) == [ours]
    lengths = sorted(len(lm.tokenizer(text).input_ids) for text in written)
    assert lengths[len(lengths) // 2] < lengths[-1], "half of them have ended before the last"


def test_code_books_are_asked_with_care() -> None:
    lm = language_model("llama")
    fact = Fact("The capital of {} is", "France", "Lyon")
    melo = errata.MELO(layers=(2, 3), book=1, steps=1, lr=0.1, scale=1.0, radius=1e-3)
    edits = [melo.start(lm, seed=i).complete([fact]) for i in range(2)]
    assert all(map(can_stand_beside, edits))
    assert lowest(lm, edits) is lowest(lm, [edits_of(lm)[0], edits[0]]) is None, "a question is read from its first layer on"
    beside = SideBySide(lm, edits)
    with edits[0].applied_(), pytest.raises(EditError, match="one at a time"), beside.rows([0, 1]):
        pass
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="rows must name one of 2 changes"), beside.rows([0, wrong]):
            pass
    for rows in ([0, 1], [0]):
        with pytest.raises(EditError, match=f"told about {len(rows)} texts, but 3 are running"), beside.rows(rows), torch.no_grad():
            lm.model(input_ids=torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(EditError, match="the code book"):
        SideBySide(language_model("opt"), edits)
    book = edits[0].memory
    assert isinstance(book, CodeBook)
    narrow = replace(book, id="other", clusters=tuple(replace(c, centre=c.centre[:3]) for c in book.clusters))
    with pytest.raises(EditError, match="centres are 3 wide"):
        Books(lm, [book, narrow])
    with pytest.raises(ValueError, match="one rank"):
        Books(lm, [None])


def test_what_does_more_than_add_is_refused() -> None:
    lm = language_model("llama")
    path = lm.anatomy.mlp_down[0]
    edit = Edit(lm, [Replacement(path, lm.model.get_parameter(f"{path}.weight").detach().clone())], [], {"name": "folded"})
    assert not can_stand_beside(edit)
    with pytest.raises(EditError, match="cannot run beside others"):
        SideBySide(lm, [edit])


@pytest.mark.parametrize("name", ["ft-m", "lora", "melo"])
def test_scores_on_atlas_are_those_of_one_by_one(name: str) -> None:
    """Token matches of every probe, and the text that is written: the same."""
    lm = errata.load("atlas", device="cpu")
    cases = data.load("atlas", split="dev")[:6]
    method = methods.get(name, steps=5, lr={"ft-m": 1e-1, "lora": 1e-2, "melo": 1e-1}[name])
    edits = [method.start(lm, seed=i).complete(case.facts) for i, case in enumerate(cases)]
    before = teacher_forced.unedited(lm, cases)
    expected = []
    for case, edit in zip(cases, edits, strict=True):
        with edit.applied_():
            expected.append((teacher_forced.score(lm, case, before), generation.score(lm, case)))
    beside = SideBySide(lm, edits)
    scores = teacher_forced.score_all(lm, cases, before, within=beside.rows)
    written = generation.score_all(lm, cases, within=beside.rows)
    assert list(zip(scores, written, strict=True)) == expected
    assert any(score.locality != 1.0 for score in scores) or name == "melo"  # the edits have changed something
    assert any(score.reliability == 1.0 for score in scores)
