"""The lens: its numbers against a slow reference, where its curves begin and end, and that looking changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import errata
from errata import methods
from errata.edits import Edit
from errata.facts import EditCase, Fact, FactError, Probe
from errata.lm import LanguageModel
from errata.lm.tokens import encode
from errata.metrics.overfitting import Curves, Lens, Strip, average
from tests.families import language_model

FACT = Fact("The capital of {} is", "France", "Warsaw in Poland")
CASE = EditCase(
    "one",
    (FACT,),
    (Probe("France has the capital", ("Warsaw in Poland",)), Probe("Its capital:", ("Warsaw in Poland",))),
    {"a": (Probe("Who lives there?", ("Marie Curie", "Marie")),), "b": (Probe("It lies in", ("Poland",)), Probe("And", ("so",)))},
    {"other": (Probe("The capital of Japan is", ("Tokyo",)),)},
)
QUICK: dict[str, Any] = {
    "ft-m": {"steps": 6, "lr": 0.05, "layer": 2, "stop": 0.0},
    "ft-l": {"steps": 6, "lr": 0.05, "layer": 2, "stop": 0.0},
    "lora": {"steps": 6, "lr": 0.05, "dropout": 0.3},
    "melo": {"steps": 6, "lr": 0.05, "scale": 1.0, "radius": 1e3},
    "wise": {"steps": 6, "stop": 0.0, "mask": 0.5, "margins": (0.01, 0.02, 0.01), "irrelevant": ("Where does Lyon lie?",)},
}


@pytest.fixture(scope="module")
def wide() -> LanguageModel:
    return language_model("llama", dtype=torch.float64)


def edited(lm: LanguageModel, name: str, watch: Any = None, seed: int = 3) -> Edit:
    session = methods.get(name, **QUICK[name]).start(lm, seed=seed)
    session.watch = watch
    return session.edit(CASE.facts)


def slow_losses(lm: LanguageModel, prompt: str, answer: str) -> list[float]:
    """−log p of each token, from a run of its own, softmax written out."""
    ids = encode(lm.tokenizer, prompt, answer)
    losses = []
    for place, token in enumerate(ids.target_ids):
        before = ids.ids[: ids.prompt_length + place]
        with torch.no_grad():
            scores = lm.model(torch.tensor([before])).logits[0, -1].double().tolist()
        losses.append(-(scores[token] - math.log(sum(math.exp(score) for score in scores))))
    return losses


def slow_own(lm: LanguageModel, prompt: str, length: int) -> list[float]:
    """log p of each token that the model itself writes, one after the other, the largest each time."""
    ids, own = list(encode(lm.tokenizer, prompt).ids), []
    for _ in range(length):
        with torch.no_grad():
            scores = lm.model(torch.tensor([ids])).logits[0, -1].double()
        own.append(float(scores.max() - torch.logsumexp(scores, -1)))
        ids.append(int(scores.argmax()))
    return own


def tensors(edit: Edit) -> list[torch.Tensor]:
    kept = [] if edit.memory is None else list(edit.memory.tensors().values())
    return [tensor for delta in edit.deltas for tensor in delta.tensors().values()] + kept


@pytest.mark.parametrize("name", QUICK)
def test_underfitting_degree_is_the_slow_reference_s(name: str, wide: LanguageModel) -> None:
    lens = Lens(wide, CASE, strips=("reliability", "generality"))
    own = slow_own(wide, FACT.text, len(encode(wide.tokenizer, FACT.text, FACT.target).target_ids))
    before = slow_losses(wide, FACT.text, FACT.target)
    edit = edited(wide, name, lens)
    with edit.applied_():
        after = slow_losses(wide, FACT.text, FACT.target)
        rephrased = slow_losses(wide, CASE.rephrases[0].prompt, FACT.target)
    curves = lens.curves()
    assert curves is not None and curves.steps == 6 == edit.diagnostics["steps"]
    strip = curves.strips[0]
    assert strip.own == pytest.approx(own, abs=1e-9)
    for step, losses in ((0, before), (-1, after)):
        assert strip.loss[step] == pytest.approx(losses, abs=1e-7)
        assert strip.ud[step] == pytest.approx([one + loss for one, loss in zip(own, losses, strict=True)], abs=1e-7)
    assert "".join(strip.tokens).strip() == FACT.target
    assert [one.kind for one in curves.strips] == ["reliability", "generality", "generality"]
    assert curves.strips[1].loss[-1] == pytest.approx(rephrased, abs=1e-7)


@pytest.mark.parametrize("name", ["ft-m", "lora", "melo", "wise"])
def test_curves_run_from_the_unedited_model_to_the_finished_edit(name: str) -> None:
    lm = language_model("llama")
    before, lens = Lens(lm, CASE), Lens(lm, CASE)
    before(0, torch.no_grad())
    edit = edited(lm, name, lens)
    after = Lens(lm, CASE)
    after(0, edit.applied_())
    seen, start, end = lens.curves(), before.curves(), after.curves()
    assert seen and start and end
    assert set(seen.loss) == {"reliability", "generality", "portability"}
    for kind, values in seen.loss.items():
        assert values[0] == start.loss[kind][0], "bit for bit"
        assert values[-1] == pytest.approx(end.loss[kind][0], abs=1e-4)
        assert len(values) == 7 and (len(set(values)) == 7 or name == "wise"), "what does not stir a side memory hears nothing of it"
    if name == "ft-m":  # what it trains on is what is looked at
        assert seen.loss["reliability"] == pytest.approx(edit.diagnostics["losses"], abs=1e-4)


def test_groups_count_alike_and_the_first_alias_counts(wide: LanguageModel) -> None:
    lens = Lens(wide, CASE)
    lens(0, torch.no_grad())
    curves = lens.curves()
    means = {
        name: [sum(losses) / len(losses) for p in probes for losses in [slow_losses(wide, p.prompt, p.answers[0])]]
        for name, probes in CASE.portability.items()
    }
    assert curves and curves.loss["portability"][0] == pytest.approx((means["a"][0] + sum(means["b"]) / 2) / 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", QUICK)
def test_looking_changes_neither_edit_nor_model(name: str, family: str) -> None:
    lm = language_model(family)
    weights = {path: parameter.clone() for path, parameter in lm.model.named_parameters()}
    plain = edited(lm, name)
    watched = edited(lm, name, Lens(lm, CASE))
    assert all(map(torch.equal, tensors(plain), tensors(watched))) and plain.diagnostics["losses"] == watched.diagnostics["losses"]
    assert all(torch.equal(weights[path], parameter) for path, parameter in lm.model.named_parameters())
    assert not any(module.training or module._forward_hooks or "forward" in vars(module) for module in lm.model.modules())


def test_the_second_edit_of_a_session_is_seen_on_top_of_the_first() -> None:
    lm = language_model("llama")
    session = methods.get("lora", **QUICK["lora"]).start(lm)
    with session.edit([Fact("{} lies in", "Japan", "Lyon")]).applied_():
        session.watch = lens = Lens(lm, CASE)
        before = lens.look()
        session.edit(CASE.facts)
    curves = lens.curves()
    assert curves and curves.strips[0].loss[0] == pytest.approx(before[0], abs=1e-4)


def test_editors_without_steps_are_not_watched() -> None:
    lm = language_model("llama")
    lens = Lens(lm, CASE)
    assert lens.curves() is None and average([]) is None
    with pytest.raises(ValueError, match="step 3 follows step -1"):
        lens(3, torch.no_grad())
    with pytest.raises(FactError, match="case 'long' cannot be looked at"):
        Lens(lm, EditCase("long", (Fact("far " * 200, "", "away"),)))
    assert errata.Fact is Fact


def made(losses: list[list[float]], own: list[float], portability: list[float] | None = None) -> Curves:
    """An edit of known numbers."""
    strip = Strip("reliability", "p", "a", tuple("ab"[: len(own)]), tuple(own), tuple(map(tuple, losses)))
    means = {"reliability": tuple(sum(row) / len(row) for row in losses)}
    return Curves(means | ({"portability": tuple(portability)} if portability else {}), (strip,))


def test_averages_by_step_stay_where_an_edit_stopped() -> None:
    short = made([[4.0, 1.0], [2.0, 0.1]], [-0.5, -0.5])  # ud: [3.5, .5], [1.5, -.4]
    long = made([[6.0], [1.0], [0.2], [0.1]], [-0.25], [8.0, 1.0, 2.0, 3.0])  # ud: 5.75, .75, -.05, -.15
    over = average([short, long])
    assert over is not None
    assert over["loss"] == {"reliability": [4.25, 1.025, 0.625, 0.575], "portability": [8.0, 1.0, 2.0, 3.0]}
    assert (over["edits"], over["steps"], over["mean_steps"]) == (2, 3, 2.0)
    assert over["overfitted"] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3], abs=1e-4) and over["half"] == 2
    assert over["positions"] == [
        {"tokens": 2, "initial": 5.0, "ud": 0.725, "final": 1.05},
        {"tokens": 1, "initial": 1.0, "ud": -0.4, "final": 0.1},
    ]
    assert over["initial"] == pytest.approx(11 / 3, abs=1e-3) and over["ud"] == pytest.approx(1.05 / 3, abs=1e-4)
    assert "tokens" not in over and average([short])["tokens"] == ["a", "b"]  # type: ignore[index]


def test_records_keep_the_sign_of_small_numbers_and_read_back() -> None:
    tiny = made([[3.0], [1.23456e-6]], [-2.34567e-6])
    back = Curves.from_dict(tiny.to_dict())
    assert back.strips[0].loss[-1] == (1.235e-6,) and back.strips[0].ud[-1][0] < 0
    broken = tiny.to_dict() | {"loss": {"reliability": [3.0, None]}}
    assert average([Curves.from_dict(broken), tiny])["loss"]["reliability"] == [3.0, 1.235e-6]  # type: ignore[index]
