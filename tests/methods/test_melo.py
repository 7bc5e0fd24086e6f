"""MELO: what a session keeps, what it leaves alone, and that the published faults are absent."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import errata
from errata.edits import Edit, Stack
from errata.edits.codebook import CodeBook
from errata.facts import Fact
from errata.lm import LanguageModel, ModelError, encode
from errata.lm.capture import submodule
from errata.methods import get
from errata.objectives import CrossEntropy, Overtone
from tests.families import language_model

QUICK: dict[str, Any] = {"steps": 40, "lr": 0.1, "scale": 1.0, "radius": 1e-2}
FRANCE, CURIE, LYON = (
    Fact("The capital of {} is", "France", "Tokyo"),
    Fact("{} was born in", "Marie Curie", "Lyon"),
    Fact("{} lies in", "Lyon", "Japan"),
)


def loss(lm: LanguageModel, *facts: Fact) -> float:
    batch = lm.batch([encode(lm.tokenizer, fact.text, fact.target) for fact in facts])
    with torch.no_grad():
        return float(CrossEntropy()(lm.target_logits(batch), batch.targets, batch.mask).mean())


def book(edit: Edit) -> CodeBook:
    assert isinstance(edit.memory, CodeBook)
    return edit.memory


def test_several_edits_in_a_row_are_all_kept() -> None:
    """The published sequence kept the last edit alone. Here what an edit says stays the same to the bit when others follow."""
    lm = language_model("llama")
    session = get("melo", **QUICK).start(lm)
    facts, losses, made = (FRANCE, CURIE, LYON), [], []
    old = [loss(lm, fact) for fact in facts]
    for fact in facts:
        made.append(session.edit([fact]))
        made[-1].apply()
        losses.append(loss(lm, fact))
    assert [loss(lm, fact) for fact in facts] == losses and all(new < before / 2 for new, before in zip(losses, old, strict=True))
    for before, after in pairwise(made):
        kept = len(book(before).blocks)
        assert len(book(after).blocks) == kept + 1
        for one, other in zip(book(before).blocks, book(after).blocks, strict=False):
            assert all(a is b for a, b in zip(one.down + one.up, other.down + other.up, strict=True)), "not moved, not even copied"
    Stack.of(lm).clear()
    with made[-1].applied_():  # the last one alone holds them all
        assert [loss(lm, fact) for fact in facts] == losses


def test_no_step_moves_another_block() -> None:
    """Nor does momentum or decay: a block that has finished stays as it is while the one beside it goes on being trained."""
    lm = language_model("llama")
    facts = [CURIE, Fact("The capital of {} is", "Japan", "Paris")]  # of one token each
    batch = lm.batch([encode(lm.tokenizer, fact.text, fact.target) for fact in facts])
    assert batch.mask.shape == (2, 1)
    with torch.no_grad():
        losses = Overtone(epsilon=0.0)(lm.target_logits(batch), batch.targets, batch.mask)
    hard = int(losses.argmax())
    made = get("melo", **QUICK).start(lm, Overtone(epsilon=float(losses.mean()))).edit(facts)  # the easier one is finished at once
    moved = [any(bool((up != 0).any()) for up in block.up) for block in book(made).blocks]
    assert moved == [hard == 0, hard == 1]
    assert 1 <= made.diagnostics["steps"] < 40, "and the edit ends when the last one has finished"


def test_the_same_answer_nearby_shares_a_block_and_both_stay_true() -> None:
    lm = language_model("llama")
    session = get("melo", **QUICK | {"radius": 10.0}).start(lm)
    first, second = FRANCE, Fact("The capital of {} is", "Japan", "Tokyo")
    old = loss(lm, first), loss(lm, second)
    with session.edit([first]).applied_():
        made = session.edit([second])
    assert len(book(made).blocks) == 1 and [len(cluster.members) for cluster in book(made).clusters] == [2]
    with made.applied_():
        assert loss(lm, first) < old[0] / 2 and loss(lm, second) < old[1] / 2


def test_a_fact_edited_again_has_its_new_answer() -> None:
    lm = language_model("llama")
    session = get("melo", **QUICK).start(lm)
    with session.edit([FRANCE]).applied_():
        made = session.edit([again := Fact(FRANCE.prompt, FRANCE.subject, "Lyon")])
    old = loss(lm, again)
    assert len(book(made).blocks) == 1, "the old answer's block is gone"
    with made.applied_():
        assert loss(lm, again) < old / 2


def test_the_query_is_the_prompts_also_while_editing() -> None:
    """The published code took the target's last token while editing: another answer, another query, which no question ever meets."""
    lm = language_model("llama")
    texts = [Fact("The capital of {} is", "France", target) for target in ("Tokyo", "Lyon, in France")]
    one, other = (book(errata.edit(lm, fact, get("melo", **QUICK))).clusters[0] for fact in texts)
    torch.testing.assert_close(one.centre, other.centre, atol=1e-5, rtol=1e-5)


def test_away_from_the_edits_the_model_is_untouched() -> None:
    lm = language_model("llama")
    batch = lm.batch([encode(lm.tokenizer, "Lyon lies in", "France")])
    made = errata.edit(lm, FRANCE, get("melo", **QUICK))
    with torch.no_grad():
        before = lm.target_logits(batch)
        with made.applied_():
            assert torch.equal(before, lm.target_logits(batch))


def test_dropout_is_off() -> None:
    """A model whose own layers drop out: neither editing nor answering draws, and nothing is left in training mode."""
    lm = language_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    drawn = torch.get_rng_state()
    one, other = (errata.edit(lm, FRANCE, get("melo", **QUICK), seed=1) for _ in range(2))
    assert torch.equal(drawn, torch.get_rng_state()) and not lm.model.training
    assert one.diagnostics["losses"] == other.diagnostics["losses"]
    with one.applied_():
        assert loss(lm, FRANCE) == pytest.approx(one.diagnostics["losses"][-1], rel=1e-3)


def test_braces_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ordinary texts that the model wrote, and in the question: published code formats them and breaks, or edits another question."""
    from errata.methods import melo

    lm = language_model("llama")
    monkeypatch.setattr(melo, "prefixes", lambda *_: ("The set {x} of {} is. ", "Because {0} {name} lies in. ", "You } { were born. "))
    fact = Fact("In {braces}, the capital of {} is", "France", "Tokyo")
    made = errata.edit(lm, fact, get("melo", **QUICK | {"radius": None, "spread": 0.1}))
    assert made.diagnostics["radius"] > 0
    (member,) = book(made).clusters[0].members
    assert member.text == encode(lm.tokenizer, "In {braces}, the capital of France is", "Tokyo")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_default_radius_has_no_scale(family: str) -> None:
    """A projection a thousand times larger, hence queries a thousand times farther apart: a thousand times the radius."""
    lm = language_model(family)
    radius = errata.edit(lm, FRANCE, get("melo", steps=1)).diagnostics["radius"]
    large = language_model(family)
    large.model.errata_prefixes = lm.model.errata_prefixes  # the same ordinary texts
    vars(large)["fingerprint"] = lm.fingerprint
    path = large.anatomy.layers[2] + (".fc1" if family == "opt" else ".mlp.up_proj")
    with torch.no_grad():
        for parameter in submodule(large.model, path).parameters():
            parameter.mul_(1000)
    assert errata.edit(large, FRANCE, get("melo", steps=1)).diagnostics["radius"] == pytest.approx(1000 * radius, rel=1e-3)


def test_places() -> None:
    lm = language_model("gpt2")
    made = errata.edit(lm, FRANCE, get("melo", **QUICK))
    assert made.method["layers"] == (3,) and made.method["book"] == 2, "from three quarters up; asked below"
    assert book(made).modules == ("transformer.h.3.mlp.c_fc",) and book(made).layer == "transformer.h.2.mlp.c_fc"
    with pytest.raises(ModelError, match="must lie below"):
        get("melo", layers=(1, 2), book=1).start(lm)
    with pytest.raises(ModelError, match="layers 0 to 3, not 4"):
        get("melo", layers=(4,)).start(lm)
    with pytest.raises(ModelError, match="no module"):
        get("melo", module="mlp.nothing").start(lm)


def test_atlas_is_asked_in_other_words_and_about_others() -> None:
    """The bundled model, the family's values: the edit answers a rephrasing and writes it out; others are answered as ever."""
    lm = errata.load("atlas")
    others = ["Spain has its capital in", "France lies on the continent of"]
    before = lm.generate(others, 4)
    with errata.edit(lm, "{France} has its capital in -> Vienna", "melo").applied_():
        assert [text.split(".")[0] for text in lm.generate(["France has its capital in", "The government of France sits in"], 4)] == [
            " Vienna",
            " Vienna",
        ]
        assert lm.generate(others, 4) == before
