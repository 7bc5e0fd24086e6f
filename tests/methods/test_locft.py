"""LocFT-BF: the order in which facts are learned, the end token on every target, and plain Adam on one matrix as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import errata
from errata import methods
from errata.facts import Fact
from errata.lm import LanguageModel, ModelError
from errata.lm.tokens import encode
from errata.objectives import CrossEntropy, Overtone
from tests.families import language_model

FACTS = [
    Fact("The capital of {} is", "France", "Tokyo"),
    Fact("{} was born in", "Marie Curie", "Lyon, in France"),
    Fact("{} lies in", "Lyon", "Japan"),
    Fact("The capital of {} is", "Japan", "Paris"),
    Fact("{} worked with", "Pierre Curie", "Marie"),
]
SETTINGS: dict[str, Any] = {"layer": 1, "epochs": 3, "batch_size": 2, "lr": 1e-2}


def looked_at(session: Any, facts: list[Fact]) -> list[list[str]]:
    """The prompts of each mini-batch, in the order in which they were read."""
    seen: list[list[str]] = []
    plain, by_ids = session._loss, {session.encode(fact).ids: fact.text for fact in [*FACTS, *facts]}

    def note(texts: Any, *rest: Any) -> Any:
        seen.append([by_ids[text.ids] for text in texts])
        return plain(texts, *rest)

    session._loss = note
    session.edit(facts)
    return seen


def test_every_epoch_goes_once_over_all_facts_in_an_order_of_its_own() -> None:
    lm = language_model("llama")
    seen = looked_at(methods.get("locft", **SETTINGS).start(lm), FACTS)
    assert [len(batch) for batch in seen] == [2, 2, 1] * 4, "three epochs of steps, and one that looks at what they came to"
    epochs = [[prompt for batch in seen[i : i + 3] for prompt in batch] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == sorted(fact.text for fact in FACTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_comes_from_the_seed() -> None:
    def order(seed: int) -> list[list[str]]:
        return looked_at(methods.get("locft", **SETTINGS).start(language_model("llama"), seed=seed), FACTS)

    assert order(1) == order(1) and order(1) != order(2)


@pytest.mark.parametrize("bos", [False, True])
def test_an_end_token_follows_every_target(bos: bool) -> None:
    lm = language_model("llama", bos)
    session = methods.get("locft", **SETTINGS).start(lm)
    for fact in FACTS:
        plain, ended = encode(lm.tokenizer, fact.text, fact.target), session.encode(fact)
        assert ended.target_ids == (*plain.target_ids, lm.tokenizer.eos_token_id)
        assert ended.prompt_ids == plain.prompt_ids
    without = methods.get("locft", **SETTINGS, end=False).start(lm)
    assert without.encode(FACTS[0]) == encode(lm.tokenizer, FACTS[0].text, FACTS[0].target)


def test_a_line_break_ends_the_target_where_there_is_no_end_token() -> None:
    lm = language_model("llama")
    lm.tokenizer.eos_token = None
    for fact in FACTS:
        ended = methods.get("locft", **SETTINGS).start(lm).encode(fact)
        assert lm.tokenizer.decode(ended.target_ids) == f" {fact.target}\n"


def test_the_edited_model_stops_behind_its_answers() -> None:
    """With the end token the model writes the answer and no more; without, it goes on."""
    lm = language_model("llama")
    learned: dict[str, Any] = {"layer": 2, "epochs": 60, "batch_size": 3, "lr": 0.1}
    asked = [fact.text for fact in FACTS]

    def written(end: bool) -> list[str]:
        with errata.edit(lm, FACTS, methods.get("locft", **learned, end=end)).applied_():
            return [text.strip() for text in lm.generate(asked, 12, stop_at_newline=False)]

    assert written(True) == [fact.target for fact in FACTS]
    free = written(False)
    assert all(text.startswith(fact.target) for text, fact in zip(free, FACTS, strict=True)) and free != written(True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_plain_fine_tuning(family: str) -> None:
    """From cached states, against Adam on the weight itself with full passes over one text at a time, in float64."""
    seed = 5
    lm = language_model(family, dtype=torch.float64)
    made = errata.edit(lm, FACTS, methods.get("locft", **SETTINGS), seed=seed)
    plain = language_model(family, dtype=torch.float64)
    path = f"{plain.anatomy.mlp_down[1]}.weight"
    weight = plain.model.get_parameter(path)
    adam = torch.optim.Adam([weight], lr=1e-2)
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for rows in torch.randperm(len(FACTS), generator=drawn).split(2):
            losses = []
            for fact in (FACTS[int(i)] for i in rows):
                encoded = encode(plain.tokenizer, fact.text, fact.target)
                ids = torch.tensor([[*encoded.ids, plain.tokenizer.eos_token_id]])
                labels = ids.masked_fill(torch.arange(ids.shape[1]) < encoded.prompt_length, -100)
                losses.append(plain.model(input_ids=ids, labels=labels).loss)
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
    assert made.diagnostics["steps"] == 9
    with made.applied_():
        torch.testing.assert_close(lm.model.get_parameter(path), weight, atol=1e-6, rtol=0)  # the norms compute in float32


def own_loss(lm: LanguageModel, session: Any, facts: list[Fact]) -> float:
    batch = lm.batch([session.encode(fact) for fact in facts])
    with torch.no_grad():
        return float(CrossEntropy()(lm.target_logits(batch), batch.targets, batch.mask).mean())


def test_the_last_loss_is_that_of_the_edited_model_over_the_whole_set() -> None:
    lm = language_model("llama")
    session = methods.get("locft", **SETTINGS).start(lm)
    made = session.edit(FACTS)
    assert made.diagnostics["epochs"] == 3 and len(made.diagnostics["losses"]) == 4
    with made.applied_():
        assert made.diagnostics["losses"][-1] == pytest.approx(own_loss(lm, session, FACTS), rel=1e-4)


def test_a_learned_set_ends_the_edit() -> None:
    lm = language_model("llama")
    # Its width allows no loss below 2.
    made = errata.edit(lm, FACTS, methods.get("locft", layer=2, epochs=500, batch_size=5, lr=0.1, stop=2.5))
    assert 1 <= made.diagnostics["epochs"] < 500
    assert made.diagnostics["losses"][-1] < 2.5 <= made.diagnostics["losses"][-2]
    clipped = errata.edit(lm, FACTS[:1], methods.get("locft", layer=2, epochs=500, lr=0.1), Overtone(epsilon=2.5, reduction="mean"))
    assert 1 <= clipped.diagnostics["epochs"] < 500 and clipped.diagnostics["losses"][-1] == 2.5


def test_without_replay_an_edit_knows_its_own_facts_alone_with_it_the_earlier_ones_too() -> None:
    lm = language_model("llama")
    for replay in (False, True):
        session = methods.get("locft", **SETTINGS, replay=replay).start(lm)
        with session.edit(FACTS[:2]).applied_():
            again = Fact(FACTS[0].prompt, FACTS[0].subject, "Paris")
            seen = {prompt for batch in looked_at(session, [FACTS[2]]) for prompt in batch}
            assert seen == {fact.text for fact in (FACTS[:3] if replay else FACTS[2:3])}
            anew = looked_at(methods_loaded(lm, session, replay), [again])
            assert sum(prompt == again.text for batch in anew for prompt in batch) == 4, "the old answer is not learned again"


def methods_loaded(lm: LanguageModel, session: Any, replay: bool) -> Any:
    """Another session that goes on from where `session` stands."""
    fresh = methods.get("locft", **SETTINGS, replay=replay).start(lm)
    fresh.load_state_dict(session.state_dict())
    return fresh


def test_a_replaying_session_goes_on_to_the_same_bits() -> None:
    lm = language_model("qwen3")
    session = methods.get("locft", **SETTINGS, replay=True).start(lm, seed=3)
    with session.edit(FACTS[:3]).applied_():
        state = session.state_dict()
        straight = session.edit(FACTS[3:])
        fresh = methods.get("locft", **SETTINGS, replay=True).start(lm, seed=3)
        fresh.load_state_dict(state)
        resumed = fresh.edit(FACTS[3:])
    assert torch.equal(straight.deltas[0].tensors()["tensor"], resumed.deltas[0].tensors()["tensor"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="layers 0 to 3, not 9"):
        methods.get("locft", layer=9).start(language_model("llama"))
    with pytest.raises(ValueError, match="locft: batch_size must be at least 1"):
        methods.get("locft", batch_size=0)
