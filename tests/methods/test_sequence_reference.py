"""Sequences of edits against the plain way to make them: whole runs, dense solves, decompositions from scratch (benchmarks/plain.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.plain import Plain
from errata.facts import Fact
from errata.lm.anatomy import matrix
from errata.lm.capture import submodule
from errata.methods import MEMIT, RECT, ROME, AlphaEdit, DeltaEdit
from tests.families import language_model

FACTS = (
    Fact("The capital of {} is", "France", "Tokyo"),
    Fact("{} was born in", "Marie Curie", "Lyon, in France"),
    Fact("Question: where does {} lie?\nAnswer:", "Lyon", "Japan"),
    Fact("The capital of {} is", "Japan", "Warsaw"),
    Fact("{} worked in", "Pierre Curie", "São Paulo"),
    Fact("The capital of {} is", "France", "Zürich"),  # the same key as the first, for another answer
)
FAMILIES = ("gpt2", "llama", "gptj", "falcon")  # Conv1D; gated; attention beside the MLP, twice
CHANGES: dict[str, Any] = {"steps": 6, "stop": 0.0, "prefixes": 2, "prefix_length": 4, "corpus": "bundled", "tokens": 600}
SPREAD: dict[str, Any] = CHANGES | {"layers": (0, 1, 2)}

METHODS = {
    "rome": ROME(layers=(1,), **CHANGES),
    "rome mixed": ROME(layers=(1,), key="mixed", whiten=False, **CHANGES),
    "memit": MEMIT(**SPREAD),
    "memit+history": MEMIT(history=True, **SPREAD),
    "rect": RECT(**SPREAD),
    "alphaedit": AlphaEdit(**SPREAD),
    "alphaedit threshold": AlphaEdit(threshold=0.3, l2=0.5, **SPREAD),
    "deltaedit": DeltaEdit(preset="paper", eta=0.5, warm_up=2, **SPREAD),
    "deltaedit capped": DeltaEdit(preset="paper", eta=0.0, warm_up=0, removed=0.2, **SPREAD),  # at most 3 of 16 directions
    "deltaedit released": DeltaEdit(eta=1.5, warm_up=3, **SPREAD),  # at most 4, after edits that m and v learn from
    "deltaedit floor": DeltaEdit(eta=0.5, warm_up=2, floor=5.0, **SPREAD),
    "deltaedit mixed": DeltaEdit(preset="paper", eta=0.1, warm_up=1, two_sided=True, start_at="first", floor=5.0, **SPREAD),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def weights(lm: Any) -> list[torch.Tensor]:
    return [matrix(submodule(lm.model, path)).detach().clone() for path in lm.anatomy.mlp_down]


def both(family: str, method: Any, batches: Sequence[Sequence[Fact]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Run both over the same edits in float64; every weight they wrote must agree after every edit. What each says of its edits."""
    ours, theirs = (language_model(family, dtype=torch.float64) for _ in range(2))
    before = weights(ours)
    session, plain = method.start(ours), Plain(theirs, method)
    said: tuple[list[dict[str, Any]], list[Any]] = ([], [])
    for facts in batches:
        edit = session.edit(facts)
        edit.apply()
        made = plain.edit(facts)
        said[0].append(edit.diagnostics)
        said[1].append(made)
        for layer, (original, a, b) in enumerate(zip(before, weights(ours), weights(theirs), strict=True)):
            moved = float((b - original).norm())
            assert (moved > 0) == (layer in plain.layers)
            assert float((a - b).norm()) <= 1e-6 * moved, f"layer {layer} after {len(said[0])} edits"
        assert edit.diagnostics["probability"] == pytest.approx(sum(made.probability) / len(facts), abs=1e-5)
        assert edit.diagnostics["steps"] == max(made.steps)
    return said


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_leaves_the_weights_that_the_plain_way_leaves(family: str, method: Any) -> None:
    said, made = both(family, method, [[fact] for fact in FACTS])
    if isinstance(method, DeltaEdit):
        assert [d["constrained"] for d in said] == [m.constrained for m in made]
        assert 2 <= sum(m.constrained for m in made) < len(FACTS), "the comparison needs edits of both kinds"


def test_the_capped_sequence_reaches_its_cap() -> None:
    """What the comparison above is worth for DeltaEdit: every edit but the first is held off the history, the last two off a part of it."""
    method = METHODS["deltaedit capped"]
    lm = language_model("llama", dtype=torch.float64)
    session: Any = method.start(lm)
    constrained, ranks = [], []
    for fact in FACTS:
        edit = session.edit([fact])
        edit.apply()
        constrained.append(edit.diagnostics["constrained"])
        ranks.append(session.history.rank)
    assert constrained == [0, 1, 1, 1, 1, 1]
    assert ranks[3:5] == [4, 5] and session.directions[0].shape == (16, 3)


@pytest.mark.parametrize("name", ["deltaedit floor", "deltaedit mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_leaves_directions_in(family: str, name: str) -> None:
    """What the comparison is worth for the floor: some edits keep fewer directions off than their rank and the cap allow, but some."""
    lm = language_model(family, dtype=torch.float64)
    session: Any = METHODS[name].start(lm)
    removed, allowed = [], []
    for fact in FACTS:
        rank = session.history.rank
        edit = session.edit([fact])
        if edit.diagnostics["constrained"]:
            removed.append(session.directions[0].shape[1])
            allowed.append(min(rank, int(session.method.removed * session.history.size)))
        edit.apply()
    assert any(0 < some < most for some, most in zip(removed, allowed, strict=True)), (removed, allowed)


@pytest.mark.parametrize("name", ["memit", "memit+history", "rect", "alphaedit", "deltaedit", "deltaedit mixed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_do_batches(family: str, name: str) -> None:
    _, made = both(family, METHODS[name], [FACTS[:2], FACTS[2:4], FACTS[4:]])
    assert any(m.constrained for m in made) == name.startswith("deltaedit")


def test_facts_of_a_batch_stop_where_they_would_stop_alone() -> None:
    _, made = both("llama", MEMIT(**SPREAD | {"stop": 6.5, "steps": 30}), [FACTS[:3]])
    assert len(set(made[0].steps)) > 1, "the test needs facts that are done at different steps"
