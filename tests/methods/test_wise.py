"""WISE: what a session keeps, what it leaves alone, and that the published faults are absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.edits import Edit, Stack
from errata.edits.side import SideMemory
from errata.facts import Fact
from errata.lm import LanguageModel, ModelError, encode
from errata.lm.anatomy import matrix
from errata.lm.capture import submodule
from errata.methods import get, irrelevant, wise
from errata.objectives import CrossEntropy, Overtone
from tests.families import language_model

APART = ("Where does Lyon lie?", "Pierre worked in", "Moscow is the", "Marie worked")
QUICK: dict[str, Any] = {"steps": 60, "irrelevant": APART, "margins": (0.01, 0.02, 0.01)}
FRANCE, CURIE, LYON = (
    Fact("The capital of {} is", "France", "Tokyo"),
    Fact("{} was born in", "Marie Curie", "Lyon"),
    Fact("{} lies in", "Lyon", "Japan"),
)


def loss(lm: LanguageModel, *facts: Fact) -> float:
    batch = lm.batch([encode(lm.tokenizer, fact.text, fact.target) for fact in facts])
    with torch.no_grad():
        return float(CrossEntropy()(lm.target_logits(batch), batch.targets, batch.mask).mean())


def memory(edit: Edit) -> SideMemory:
    assert isinstance(edit.memory, SideMemory)
    return edit.memory


def run(lm: LanguageModel, facts: Sequence[Fact], **settings: Any) -> list[Edit]:
    """A session's edits in a row, all applied."""
    session = get("wise", **QUICK | settings).start(lm)
    made = []
    for fact in facts:
        made.append(session.edit([fact]))
        made[-1].apply()
    return made


def test_the_margin_loss_is_the_papers() -> None:
    """Against the terms one by one, and its derivative: a question that keeps every margin is pulled at by none."""
    inside = torch.tensor([1.0, 6.0, 30.0], dtype=torch.float64, requires_grad=True)
    outside = torch.tensor([2.0, 7.0], dtype=torch.float64, requires_grad=True)
    found = wise.margin(inside, outside, 5.0, 20.0, 10.0)
    terms: tuple[list[float], ...] = (
        [max(0.0, o - i + 10) for i in inside.tolist() for o in outside.tolist()],
        [max(0.0, o - 5) for o in outside.tolist()],
        [max(0.0, 20 - i) for i in inside.tolist()],
    )
    assert float(found.detach()) == pytest.approx(sum(sum(each) / sum(e > 0 for e in each) for each in terms))
    pulls, pushes = torch.autograd.grad(found, (inside, outside))
    assert pulls[0] < 0 and pulls[1] < 0 and pulls[2] == 0 and (pushes > 0).all()
    assert wise.margin(torch.tensor([30.0]), torch.tensor([1.0]), 5.0, 20.0, 10.0) == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"save_every": 1, "merge_every": 9}, {"save_every": 1, "merge_every": 2}, {"save_every": 1, "merge_every": 2, "mode": "merge"}],
    ids=["one shard", "a shard each", "retrieve", "merge"],
)
def test_several_edits_in_a_row_are_all_kept(settings: dict[str, Any]) -> None:
    """The published sequence kept the last edit alone. Here all are kept: in one shard, in several, and when they were merged."""
    lm = language_model("llama", intermediate_size=160)
    facts = (FRANCE, CURIE, LYON)
    old = [loss(lm, fact) for fact in facts]
    made = run(lm, facts, **settings)
    assert all(loss(lm, fact) < 0.75 * before for fact, before in zip(facts, old, strict=True))
    texts = [[text for side in memory(edit).sides for text in side.texts] for edit in made]
    assert [len(each) for each in texts] == [1, 2, 3] and texts[2][:2] == texts[1] and texts[1][:1] == texts[0]
    Stack.of(lm).clear()
    with made[-1].applied_():  # the last one alone holds them all
        assert all(loss(lm, fact) < 0.75 * before for fact, before in zip(facts, old, strict=True))


def test_replay_keeps_what_the_shard_was_told_before() -> None:
    lm = language_model("llama", intermediate_size=160)
    facts, left = (FRANCE, CURIE, LYON), []
    for replay in (0, 2):
        run(lm, facts, replay=replay)
        left.append(loss(lm, *facts[:2]))
        Stack.of(lm).clear()
    assert left[1] < 0.9 * left[0]


def test_shards_close_and_merge() -> None:
    lm = language_model("llama")
    quick: dict[str, Any] = {"save_every": 1, "merge_every": 2, "steps": 5}
    made = run(lm, [FRANCE, CURIE, LYON, FRANCE, CURIE], **quick)
    kept = [[(len(side.texts), side.merged) for side in memory(edit).sides] for edit in made]
    assert kept == [[(1, False)], [(2, True)], [(2, True), (1, False)], [(2, True), (2, True)], [(2, True), (2, True), (1, False)]]
    Stack.of(lm).clear()
    made = run(lm, [FRANCE, CURIE, LYON, FRANCE], **quick, mode="merge")
    assert [(len(side.texts), side.merged) for side in memory(made[-1]).sides] == [(4, True)]


def test_the_mask_shields_from_gradient_and_decay() -> None:
    """As published, decay moves every entry of W′. Here what the shard may not change is W to the bit, and what it may does decay."""
    lm = language_model("llama")
    session: Any = get("wise", **QUICK, decay=0.01).start(lm)
    allowed = session._drawn_mask()
    session.begun = 0
    change = memory(session.edit([FRANCE])).sides[0].change(allowed.shape)
    free: Any = get("wise", **QUICK, decay=0.0).start(lm)
    without = memory(free.edit([FRANCE])).sides[0].change(allowed.shape)
    for found in (change, without):
        assert bool((found[~allowed] == 0).all()) and bool((found[allowed] != 0).any())
    main = matrix(submodule(lm.model, session.module)).detach()
    assert (main + change)[allowed].norm() < (main + without)[allowed].norm()
    assert 0.1 < float(allowed.float().mean()) < 0.3
    assert (session._drawn_mask() & allowed).float().mean() < 0.1, "each shard has a subspace of its own"


def test_questions_of_a_shard_stay_inside_when_it_goes_on() -> None:
    """Its threshold is that of the weights as they are: later edits of the shard move the distances of earlier questions."""
    lm = language_model("llama")
    session: Any = get("wise", **QUICK).start(lm)
    for count, fact in enumerate((FRANCE, CURIE, LYON), 1):
        made = session.edit([fact])
        (one,) = memory(made).sides
        made.apply()
        with memory(made).attached(lm) as chosen, torch.no_grad():
            batch = lm.batch([encode(lm.tokenizer, each.text, each.target) for each in (FRANCE, CURIE, LYON)[:count]])
            lm.target_logits(batch)
            which = chosen()
        assert which is not None and which.tolist() == [0] * count
        assert one.threshold >= session._margins[0]


def test_the_model_itself_is_never_touched() -> None:
    lm = language_model("llama")
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    batch = lm.batch([encode(lm.tokenizer, "Pierre worked in", "Paris")])
    with torch.no_grad():
        said = lm.target_logits(batch)
    run(lm, [FRANCE], margins=(0.25, 1.0, 0.5), steps=70)
    with torch.no_grad():
        assert torch.equal(said, lm.target_logits(batch)), "an irrelevant question is answered as ever"
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())


def test_a_fact_edited_again_has_its_new_answer() -> None:
    """Also where the old answer stands in an earlier shard: the new one is made to be stirred more."""
    lm = language_model("llama")
    again = Fact(FRANCE.prompt, FRANCE.subject, "Lyon")
    for save_every in (500, 1):
        old = loss(lm, again)
        run(lm, [FRANCE, again], save_every=save_every)
        assert loss(lm, again) < 0.7 * old
        Stack.of(lm).clear()


def test_dropout_is_off() -> None:
    """A model whose own layers drop out: neither editing nor answering draws, and nothing is left in training mode."""
    lm = language_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    drawn = torch.get_rng_state()
    one, other = (errata.edit(lm, FRANCE, get("wise", **QUICK), seed=1) for _ in range(2))
    assert torch.equal(drawn, torch.get_rng_state()) and not lm.model.training
    assert one.diagnostics["losses"] == other.diagnostics["losses"]
    with one.applied_():
        assert loss(lm, FRANCE) == pytest.approx(one.diagnostics["losses"][-1], rel=1e-3, abs=1e-5)


def test_braces_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prefixes that the model wrote, in the question and in irrelevant prompts: published code formats them and breaks."""
    lm = language_model("llama")
    monkeypatch.setattr(wise, "prefixes", lambda *_: ("The set {x} of {} is. ", "You } { were born. "))
    fact = Fact("In {braces}, the capital of {} is", "France", "Tokyo")
    session: Any = get("wise", **QUICK | {"prefixes": 2, "irrelevant": ("A set {of} {} is", "Moscow is")}).start(lm)
    texts = [encode(lm.tokenizer, "The set {x} of {} is. In {braces}, the capital of France is", "Tokyo")]
    assert session._behind_prefixes([fact])[:1] == texts
    made = session.edit([fact])
    assert memory(made).sides[0].texts == (encode(lm.tokenizer, "In {braces}, the capital of France is", "Tokyo"),)
    old = loss(lm, fact)
    with made.applied_():
        assert loss(lm, fact) < 0.7 * old


def test_overtone_shrinks_the_margins_and_stops_when_it_has_finished() -> None:
    """Its losses end at ε, above the published limit of 0.02, and the published loop would go on to its last step."""
    lm = language_model("llama")
    plain, shrunk = (get("wise", **QUICK).start(lm, objective) for objective in (None, Overtone(epsilon=2.5, reduction="mean")))
    assert (plain.method.shrink, shrunk.method.shrink) == (1.0, 0.6)  # type: ignore[attr-defined]
    assert shrunk._margins == pytest.approx([0.6 * each for each in plain._margins])  # type: ignore[attr-defined]
    made = get("wise", **QUICK | {"margins": (9.0, 0.01, 0.01), "irrelevant": ("Lyon",)}).start(lm, shrunk.objective).edit([FRANCE])
    assert 1 <= made.diagnostics["steps"] < 60 and made.diagnostics["losses"][-1] == 2.5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_default_margins_have_no_scale(family: str) -> None:
    """A matrix that puts out a thousandfold: a thousandfold unit, and a rate that moves outputs as far in units; absolute ones stay."""
    lm, large = language_model(family), language_model(family)
    vars(large)["fingerprint"] = lm.fingerprint
    with torch.no_grad():
        for parameter in submodule(large.model, large.anatomy.mlp_down[3]).parameters():
            parameter.mul_(1000)
    small, big = (get("wise", **QUICK).start(model) for model in (lm, large))
    assert big.unit == pytest.approx(1000 * small.unit, rel=1e-4) and big.rate == pytest.approx(1e6 * small.rate, rel=1e-4)  # type: ignore[attr-defined]
    absolute: Any = get("wise", irrelevant=APART, unit=1.0, margins=(5, 20, 10)).start(large)
    assert absolute._margins == (5, 20, 10) and absolute.rate == 1.0


def test_places_and_published_values() -> None:
    lm = language_model("gpt2")
    made = errata.edit(lm, FRANCE, get("wise", **QUICK))
    assert memory(made).module == "transformer.h.3.mlp.c_proj", "five sixths up in four layers"
    with pytest.raises(ModelError, match="layers 0 to 3, not 4"):
        get("wise", layer=4).start(lm)
    assert errata.WISE.family_defaults["llama-2-7b"] == {"layer": 27, "margins": (5.0, 20.0, 10.0), "unit": 1.0}


def test_irrelevant_prompts(tmp_path: Path) -> None:
    lm = language_model("llama")
    mend = [{"src": "Q?", "alt": "a", "loc": "nq question: who is {he}?", "loc_ans": "x"}]
    know = {"prompt": "p", "locality": {"Other": [{"prompt": "The {sea} is", "ground_truth": "x"}]}}
    (tmp_path / "mend.json").write_text(json.dumps(mend), encoding="utf-8")
    (tmp_path / "know.jsonl").write_text(json.dumps(know) + "\n", encoding="utf-8")
    (tmp_path / "plain.txt").write_text("The mill waited in the cold. No.\nThe tide grew louder", encoding="utf-8")

    def of(source: Any) -> tuple[str, ...]:
        return irrelevant.irrelevant(lm, source)

    assert of(str(tmp_path / "mend.json")) == ("nq question: who is {he}?",)
    assert of(str(tmp_path / "know.jsonl")) == ("The {sea} is",)
    assert of(str(tmp_path / "plain.txt")) == ("The mill waited in the", "The tide grew")
    assert of(("a b", " ")) == ("a b",)
    assert len(of(None)) == 20, "what the model writes, where no text lies beside it"
    assert len(of("bundled")) == 2000
    with pytest.raises(ValueError, match="holds no irrelevant prompts"):
        of(())
    assert irrelevant.without(["France lies in", "Lyon lies in"], [FRANCE]) == ["Lyon lies in"]


def test_atlas_is_asked_in_other_words_and_about_others() -> None:
    """The bundled model, the family's values: the edit answers a rephrasing and writes it out; others are answered as ever."""
    lm = errata.load("atlas")
    others = ["Spain has its capital in", "France lies on the continent of"]
    before = lm.generate(others, 4)
    with errata.edit(lm, "{France} has its capital in -> Vienna", "wise").applied_():
        assert [text.split(".")[0] for text in lm.generate(["France has its capital in", "The capital of France is"], 4)] == [
            " Vienna",
            " Vienna",
        ]
        assert lm.generate(others, 4) == before
