"""What sets the locate-then-edit editors apart, one page each; that they equal the plain way is in test_sequence_reference.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata import methods
from errata.edits import DenseDelta, Edit, EditError, LowRankDelta, Stack
from errata.facts import Fact, FactError
from errata.lm import LanguageModel, ModelError
from errata.lm.anatomy import matrix
from errata.lm.capture import submodule
from errata.methods.locate.contexts import request
from errata.methods.locate.ridge import Ridge
from errata.methods.locate.session import LocateSession
from errata.methods.locate.sweep import Sweep
from tests.families import language_model

TEXT: dict[str, Any] = {"corpus": "bundled", "tokens": 400, "prefixes": 1, "prefix_length": 3, "clamp": 30.0}
FACTS = [
    Fact("The capital of {} is", "France", "Tokyo"),
    Fact("{} was born in", "Marie Curie", "Lyon, in France"),
    Fact("{} lies in", "Zürich", "Japan"),
    Fact("The capital of {} is", "Japan", "Paris"),
    Fact("{} worked in", "Pierre Curie", "São Paulo"),
    Fact("Where does {} lie? It lies in", "Lyon", "Russia"),
]


def factors(edit: Edit, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    (delta,) = [delta for delta in edit.deltas if delta.path == path]
    assert isinstance(delta, LowRankDelta)
    return delta.left.double(), delta.right.double()


def in_a_row(lm: LanguageModel, method: methods.Method, facts: list[Fact] = FACTS) -> list[Edit]:
    session, edits = method.start(lm), []
    for fact in facts:
        edits.append(session.edit([fact]))
        edits[-1].apply()
    return edits


def test_rome_gives_the_key_its_value_and_its_published_code_nearly() -> None:
    lm = language_model("gpt2", dtype=torch.float64)
    path = lm.anatomy.mlp_down[1]
    weight = matrix(submodule(lm.model, path)).detach().clone()
    for settings in ({}, {"whiten": False}, {"key": "mixed"}):
        edit = errata.edit(lm, FACTS[0], errata.ROME(**TEXT, **settings))
        left, right = factors(edit, path)
        (key,) = edit.keys[path].double()
        assert left.shape == (16, 1) and torch.allclose(right @ key, torch.ones(1, dtype=torch.float64))
        with edit.applied_():
            now = matrix(submodule(lm.model, path)).detach()
            torch.testing.assert_close(now @ key, weight @ key + left[:, 0])


def test_facts_that_no_write_can_tell_apart_are_refused() -> None:
    lm = language_model("llama")
    with pytest.raises(EditError, match="cannot write these facts together"):
        errata.edit(lm, [FACTS[0], replace(FACTS[0], target="Lyon")], errata.ROME(**TEXT))


def test_memit_shares_out_and_several_facts_go_together() -> None:
    """At layer i of L a part 1 / (L − i) of what is missing is written; a batch reaches its values as single edits do."""
    lm = language_model("llama", dtype=torch.float64)
    method = errata.MEMIT(**{**TEXT, "prefixes": 0}, layers=(0, 1, 2), weight=1e-6)
    session: Any = method.start(lm)
    requests = [request(lm, fact, ()) for fact in FACTS[:3]]
    sweep = Sweep(lm, requests, session.layers)
    values = session.values(sweep, requests)
    edit = method.start(lm).edit(FACTS[:3])
    first, _ = factors(edit, lm.anatomy.mlp_down[0])
    torch.testing.assert_close(first.T, values.delta / 3)
    with edit.applied_():
        reached = Sweep(lm, requests, session.layers).reached
    torch.testing.assert_close(reached, sweep.reached + values.delta, atol=1e-3, rtol=1e-3)


def test_history_holds_on_to_what_was_written() -> None:
    """After later edits, an earlier key still gets nearly what its own edit gave it; without history it does not."""
    moved = {}
    for history in (False, True):
        lm = language_model("llama", dtype=torch.float64)
        edits = in_a_row(lm, errata.MEMIT(**TEXT, layers=(1,), weight=1e-3, history=history))
        path = lm.anatomy.mlp_down[1]
        key = edits[0].keys[path][0].double()
        later = sum((left @ (right @ key) for left, right in (factors(edit, path) for edit in edits[1:])), torch.zeros(16))
        left, right = factors(edits[0], path)
        moved[history] = float((later).norm() / (left @ (right @ key)).norm())  # type: ignore[arg-type]
    assert moved[True] < 0.5 * moved[False]


def test_the_key_that_was_solved_with_is_the_edited_models_own() -> None:
    """Published code computes the keys once more after the edit, for the history. It need not: see `LocateSession.remember`."""
    lm = language_model("llama", dtype=torch.float64)
    session: Any = errata.AlphaEdit(**TEXT, layers=(0, 1, 2)).start(lm)
    edit = session.edit([FACTS[0]])
    with edit.applied_():
        requests = [request(lm, FACTS[0], session.prefixes)]
        again = Sweep(lm, requests, session.layers).before
    for layer in session.layers:
        torch.testing.assert_close(session.key(again[layer]), edit.keys[lm.anatomy.mlp_down[layer]], atol=1e-9, rtol=1e-7)


LAST = (1,)
KEEPERS = {
    "alphaedit": errata.AlphaEdit(**TEXT, layers=(0, 1)),
    "deltaedit": errata.DeltaEdit(**TEXT, layers=(0, 1), warm_up=1),
    "memit+history": errata.MEMIT(**TEXT, layers=(0, 1), weight=1e-6, history=True),  # hardly any moments: a key's share in M is 1e7
    "rect+history": errata.RECT(**TEXT, layers=LAST, history=True),  # its β stands in no edit
}


def sums(session: Any) -> list[torch.Tensor]:
    """What a session has made of its history, layer by layer."""
    return [ridge.solve(torch.eye(ridge.width, dtype=torch.float64)[:8]) for ridge in session.ridges.values()]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(sums(one), sums(other), strict=True)) and one.lineage == other.lineage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", KEEPERS)
def test_a_history_is_in_the_edits_and_small(name: str, batch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A session that goes on from what was saved has the sums of the one that made the edits, to the bit; keys are kept only where nothing
    less will do."""
    lm, method = language_model("llama", dtype=dtype), KEEPERS[name]
    session: Any = method.start(lm)
    edits = []
    for start in range(0, 6, batch):
        edits.append(session.edit(FACTS[start : start + batch]))
        edits[-1].apply()
        edits[-1].save(tmp_path / str(start))
    loaded = [Edit.load(tmp_path / str(start), lm) for start in range(0, 6, batch)]
    fresh: Any = method.start(lm)
    fresh.resume(loaded[:1])
    fresh.resume(loaded[1:])  # in two steps, as well
    assert equal(fresh, session)
    if name == "deltaedit":
        every = torch.eye(session.history.width)
        assert torch.equal(fresh.history.norm2(every), session.history.norm2(every))
    kept = {key.partition(".")[0]: tensor for edit in edits if edit.trail for key, tensor in edit.trail.tensors.items()}
    if name in ("alphaedit", "deltaedit"):
        assert kept.keys() == {"factor"} and kept["factor"].shape == (batch, batch)
    elif dtype != torch.float64 or name == "rect+history":
        assert "keys" in kept


def test_methods_that_forget_keep_nothing() -> None:
    edit = errata.edit(language_model("llama"), FACTS[0], errata.MEMIT(**TEXT, layers=LAST))
    assert edit.trail is None and edit.keys


@pytest.mark.parametrize("name", KEEPERS)
def test_a_history_with_a_gap_is_looked_at_again(name: str) -> None:
    """The second of three is undone: the keys of the others are the model's own, as it was when the session took them up; and they stay
    so when others have been made since."""
    lm, method = language_model("llama"), KEEPERS[name]
    first, undone, third = in_a_row(lm, method, FACTS[:3])
    undone.revert()
    session: Any = method.start(lm)
    session.resume([first, third])
    requests = [request(lm, fact, session.prefixes) for fact in (FACTS[0], FACTS[2])]
    before = Sweep(lm, requests, session.layers).before
    plain: Any = method.start(lm)
    for layer, ridge in plain.ridges.items():
        ridge.remember(plain.key(before[layer]))
    assert all(torch.equal(a, b) for a, b in zip(sums(session), sums(plain), strict=True))
    later = []
    for fact in FACTS[3:]:
        later.append(session.edit([fact]))
        later[-1].apply()
    weights = [lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[layer]).clone() for layer in session.layers]
    fresh: Any = method.start(lm)
    fresh.resume([first, third, *later])
    assert equal(fresh, session)
    assert [lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[layer]).tolist() for layer in session.layers] == [w.tolist() for w in weights]
    assert Stack.of(lm).active == [first, third, *later]


@pytest.mark.parametrize("undone", ["own, then the other's", "the other's alone"])
def test_what_another_method_wrote_is_part_of_the_history(undone: str) -> None:
    """Keys are those of the model with it; what was solved over them must not be put over others once it is undone."""
    lm, method = language_model("llama"), KEEPERS["alphaedit"]
    session: Any = method.start(lm)
    first, second = session.edit([FACTS[0]]), session.edit([FACTS[1]])
    Stack.of(lm).apply(first, second)
    other = errata.edit(lm, FACTS[3], errata.MEMIT(**TEXT, layers=(0, 1)))
    other.apply()
    if undone.startswith("own"):
        first.revert()
    session = method.start(lm)
    session.resume(list(Stack.of(lm).active))
    Stack.of(lm).apply(last := session.edit([replace(FACTS[1], target="Paris")]))
    other.revert()
    fresh: Any = method.start(lm)
    fresh.resume(left := list(Stack.of(lm).active))
    plain: Any = method.start(lm)
    for layer, keys in own_keys(lm, plain, [fact for edit in left for fact in edit.facts]).items():
        plain.ridges[layer].remember(keys)
    assert last in left and all(torch.equal(a, b) for a, b in zip(sums(fresh), sums(plain), strict=True))


def own_keys(lm: LanguageModel, session: Any, facts: list[Fact]) -> dict[int, torch.Tensor]:
    """As the model has them now."""
    before = Sweep(lm, [request(lm, fact, session.prefixes) for fact in facts], session.layers).before
    return {layer: session.key(contexts) for layer, contexts in before.items()}


def test_a_session_that_looked_is_told_of_others_before_its_next_edit() -> None:
    """As `rebase` tells it, edit by edit: the sums are those of one that takes up all of them at once."""
    lm, method = language_model("llama"), KEEPERS["alphaedit"]
    edits = in_a_row(lm, method, FACTS[:3])
    edits[0].revert()
    session: Any = method.start(lm)
    session.resume(edits[1:])
    other = errata.edit(lm, FACTS[3], errata.MEMIT(**TEXT, layers=(0, 1)))
    other.apply()
    session.resume([other])
    fresh: Any = method.start(lm)
    fresh.resume([*edits[1:], other])
    assert equal(session, fresh) and session.looked


def test_so_are_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text in a file may be another one by the next time."""
    lm, method = language_model("llama"), KEEPERS["alphaedit"]
    edits = in_a_row(lm, method, FACTS[:2])
    monkeypatch.setattr(LocateSession, "_beginning", lambda self: "other text")
    session: Any = method.start(lm)
    session.resume(edits)
    assert session.looked and [ridge.count for ridge in session.ridges.values()] == [2, 2]


def test_a_look_that_is_broken_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, method = language_model("llama"), KEEPERS["deltaedit"]
    edits = in_a_row(lm, method, FACTS[:4])
    edits[1].revert()
    before = lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[0]).clone()
    session: Any = method.start(lm)
    name = session.lineage
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ridge, "remember", raising(KeyboardInterrupt))
        session.resume([edits[0], *edits[2:]])
    assert torch.equal(before, lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[0])) and Stack.of(lm).active == [edits[0], *edits[2:]]
    assert (session.lineage, session.count, session.facts, session.history.rank) == (name, 0, [], 0)
    session.resume([edits[0], *edits[2:]])
    assert session.count == 3 and [ridge.count for ridge in session.ridges.values()] == [3, 3]


def raising(error: type[BaseException]) -> Any:
    def act(*_: Any) -> None:
        raise error

    return act


def test_what_cannot_be_gone_on_from_is_said() -> None:
    lm, method = language_model("llama"), KEEPERS["alphaedit"]
    edits = in_a_row(lm, method, FACTS[:3])
    edits[0].trail = None  # as an older errata saved it
    with pytest.raises(EditError, match="does not say what a session must know"):
        method.start(lm).remember(edits[0])
    session: Any = method.start(lm)
    session.resume(edits)
    assert session.count == 3 and [ridge.count for ridge in session.ridges.values()] == [3, 3]
    Stack.of(lm).fold()
    with pytest.raises(EditError, match="was folded with others"):  # the first is to be looked at without those that were made on it
        method.start(lm).resume(edits)


def test_edits_that_were_not_made_on_one_another_go_together_too() -> None:
    """Three edits of the unedited model about one subject, as `Method.many` makes them: nothing has to be known of one another."""
    lm, method = language_model("llama"), KEEPERS["alphaedit"]
    facts = [replace(FACTS[0], target=target) for target in ("Tokyo", "Lyon", "Paris")]
    edits = [edit for edit in method.many(lm, [[fact] for fact in facts], [0, 0, 0]) if isinstance(edit, Edit)]
    Stack.of(lm).apply(*edits)
    session: Any = method.start(lm)
    session.resume(edits)
    assert [ridge.count for ridge in session.ridges.values()] == [3, 3]
    assert session.edit([FACTS[3]]).diagnostics["losses"]


def test_rect_keeps_the_entries_that_change_most() -> None:
    lm = language_model("gpt2")
    whole = errata.edit(lm, FACTS[0], errata.MEMIT(**TEXT, layers=(1,)))
    part = errata.edit(lm, FACTS[0], errata.RECT(**TEXT, layers=(1,), keep=0.25))
    (dense,) = part.deltas
    assert isinstance(dense, DenseDelta)
    left, right = factors(whole, dense.path)
    full, kept = (left @ right).float(), dense.tensor.T  # GPT-2 stores the transpose
    chosen = kept != 0
    assert int(chosen.sum()) == round(0.25 * kept.numel())
    torch.testing.assert_close(kept[chosen], full[chosen])
    relative = (full / (matrix(submodule(lm.model, dense.path)) + 1e-8)).abs()
    assert relative[chosen].min() >= relative[~chosen].max()


def test_prune_holds_the_whole_sequence_down_once() -> None:
    lm = language_model("llama", dtype=torch.float64)
    method = errata.PRUNE(**TEXT, layers=(1,), weight=1e-3, growth="linear")
    session = method.start(lm)
    for fact in FACTS:
        session.edit([fact]).apply()
    path = lm.anatomy.mlp_down[1]
    original, change = Stack.of(lm).change(path)
    limit = torch.linalg.matrix_norm(original, ord=2)
    sigma = torch.linalg.svdvals(change)
    assert sigma[0] > limit, "the test needs a change that is larger than the weight"
    (last,) = session.finish()
    restrained = torch.linalg.svdvals(change + last.tensors()["tensor"])
    torch.testing.assert_close(restrained, torch.where(sigma > limit, (sigma + limit) / 2, sigma).sort(descending=True).values)
    Stack.of(lm).clear()
    single = errata.edit(lm, FACTS[0], method)
    assert [type(delta) for delta in single.deltas] == [LowRankDelta, DenseDelta], "a single edit is a sequence of one"


def test_alphaedit_leaves_ordinary_keys_alone() -> None:
    lm = language_model("llama", dtype=torch.float64)
    session: Any = errata.AlphaEdit(**TEXT, layers=(1,), share=0.5).start(lm)
    left, right = factors(session.edit([FACTS[0]]), lm.anatomy.mlp_down[1])
    vectors = torch.linalg.eigh(session.moments.mean(1)).eigenvectors  # by ascending eigenvalue
    assert (right @ vectors[:, 20:]).abs().max() < 1e-9 * right.norm(), "the twenty directions that text uses most do not feel it"
    assert left.norm() > 0 and (right @ vectors[:, :20]).norm() > 0.99 * right.norm()


@pytest.mark.parametrize("strict", [False, True])
def test_deltaedit_writes_where_no_earlier_edit_wrote(strict: bool) -> None:
    """With every edit held to P_α the values are orthogonal to all earlier ones; strict: what is written is, too."""
    lm = language_model("llama", dtype=torch.float64)
    method = errata.DeltaEdit(**TEXT, preset="paper", layers=(0, 1), eta=0.0, warm_up=0, strict=strict)
    session: Any = method.start(lm)
    session._exceeds = lambda noise: session.count > 0
    path, before = lm.anatomy.mlp_down[1], torch.zeros(16, 0, dtype=torch.float64)
    for fact in FACTS[:5]:
        requests = [request(lm, fact, session.prefixes)]
        delta = session.values(Sweep(lm, requests, session.layers), requests).delta
        edit = session.edit([fact])
        assert (delta @ before).abs().max() < 1e-9 * delta.norm() if session.count > 1 else True
        left, _ = factors(edit, path)
        if strict and session.count > 1:
            assert (left.T @ before).abs().max() < 1e-6 * left.norm()
        before = torch.cat([before, left / left.norm()], 1)
        edit.apply()
        assert edit.diagnostics["constrained"] == (session.count > 1)


def test_a_blocked_edit_gets_a_second_free_try() -> None:
    """The whole space is taken, so under P_α nothing is left to write with."""
    lm = language_model("llama")
    facts = [Fact("The capital of {} is", f"France{i}", "Tokyo") for i in range(18)]
    made = {}
    for retry in (None, 0.9):
        session: Any = errata.DeltaEdit(**TEXT, preset="paper", layers=(1,), removed=1.0, retry=retry, steps=5).start(lm)
        session._exceeds = lambda noise, session=session: session.count > 0
        for fact in facts:
            made[retry] = session.edit([fact])
            made[retry].apply()
        Stack.of(lm).clear()
    assert made[None].diagnostics["constrained"] == 1 and made[None].diagnostics["retried"] == 0
    assert made[0.9].diagnostics["constrained"] == 0 and made[0.9].diagnostics["retried"] == 1
    free, blocked = (float(factors(made[retry], lm.anatomy.mlp_down[1])[0].norm()) for retry in (0.9, None))
    assert free > 0.1 and blocked < 1e-3 * free


def test_deltaedits_presets_fill_in_what_is_open() -> None:
    lm = language_model("llama")
    paper, released = (errata.DeltaEdit(preset=name).for_model(lm) for name in ("paper", "released"))  # type: ignore[arg-type]
    assert (paper.statistic, paper.warm_up, paper.removed, paper.two_sided, paper.key) == ("squared", 5, 0.75, False, "mean")
    assert (released.statistic, released.warm_up, released.removed, released.two_sided, released.key) == ("norm", 20, 0.25, True, "bare")
    assert released.enough == 0.98 and paper.enough is None
    relaxed = errata.DeltaEdit(preset="relaxed").for_model(lm)
    assert (relaxed.retry, relaxed.patience, relaxed.removed, relaxed.statistic) == (0.9, 2, 0.1, "norm") and released.retry is None
    assert errata.DeltaEdit().for_model(lm) == released
    own = errata.DeltaEdit(preset="released", warm_up=3).for_model(lm)
    assert own.warm_up == 3 and own.removed == 0.25


@pytest.mark.parametrize("name", ["rome", "memit", "memit+history", "prune", "rect", "alphaedit", "deltaedit"])
def test_a_long_sequence_goes_on_where_it_stopped(name: str) -> None:
    """Four edits, then state and weights into a new session on another copy of the model: what follows is the same, bit for bit."""
    changes = {"eta": 0.1, "warm_up": 1} if name == "deltaedit" else {}
    method = methods.get(name, **TEXT, steps=5, **changes)
    lm = language_model("qwen3")
    session = method.start(lm)
    for fact in FACTS[:4]:
        session.edit([fact]).apply()
    state, base = session.state_dict(), Stack.of(lm).fold()
    straight = [session.edit([fact]) for fact in FACTS[4:]]
    other = language_model("qwen3")
    resumed = method.start(other)
    resumed.load_state_dict(state)
    Edit(other, base.deltas, [], {"name": "base"}).apply()
    for expected, fact in zip(straight, FACTS[4:], strict=True):
        got = resumed.edit([fact])
        for a, b in zip(expected.deltas, got.deltas, strict=True):
            assert all(map(torch.equal, a.tensors().values(), b.tensors().values()))
    assert [delta.path for delta in resumed.finish()] == [delta.path for delta in session.finish()]


def test_post_norm_models_take_one_layer_and_say_so() -> None:
    for family in ("gemma2", "gemma3", "olmo2", "granite"):
        lm = language_model(family)
        assert len(errata.MEMIT().for_model(lm).layers or ()) == 1
        with pytest.raises(ModelError, match="norm between its MLPs and the residual stream"):
            errata.edit(lm, FACTS[0], errata.AlphaEdit(**TEXT, layers=(0, 1)))


def test_requests_that_do_not_fit() -> None:
    lm = language_model("llama")
    with pytest.raises(ModelError, match="rome writes into one layer"):
        errata.edit(lm, FACTS[0], errata.ROME(**TEXT, layers=(0, 1)))
    with pytest.raises(ModelError, match="layers 0 to 3, not 7"):
        errata.edit(lm, FACTS[0], errata.MEMIT(**TEXT, layers=(7,)))
    with pytest.raises(FactError, match="names no subject"):
        errata.edit(lm, "The capital of France is -> Lyon", errata.MEMIT(**TEXT))
    with pytest.raises(FactError, match="too long"):
        errata.edit(lm, Fact("Once " * 90 + "{} was in", "Lyon", "France"), errata.MEMIT(**TEXT))
    for build, message in (
        (lambda: errata.MEMIT(layers=(3, 2)), "from low to high"),
        (lambda: errata.RECT(keep=0.0), "rect: keep must be above 0"),
        (lambda: errata.AlphaEdit(l2=0.0), "alphaedit: l2 must be above 0"),
        (lambda: errata.DeltaEdit(preset="ours"), "preset must be 'paper' or 'released' or 'relaxed'"),  # type: ignore[arg-type]
        (lambda: errata.ROME(steps=0), "rome: steps must be at least 1"),
        (lambda: errata.PRUNE(growth="cubic"), "unknown restraint"),
        (lambda: errata.ROME(key="bare"), "key must be 'mean' or 'mixed'"),  # type: ignore[arg-type]
        (lambda: errata.AlphaEdit(threshold=0.1, share=0.5), "not both"),
        (lambda: errata.DeltaEdit(xi=1.0), "xi must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_a_model_that_has_run_away_is_not_edited_further() -> None:
    lm = language_model("llama")
    session = errata.AlphaEdit(**TEXT, layers=(1,)).start(lm)
    state = session.state_dict()
    path = lm.anatomy.mlp_down[0]
    broken = Edit(lm, [DenseDelta(path, torch.full((16, 40), torch.nan))], [], {"name": "broken"})
    with broken.applied_(), pytest.raises(EditError, match="not finite any more"):
        session.edit([FACTS[0]])
    after = session.state_dict()
    assert after["count"] == state["count"] and torch.equal(after["ridges"]["1"]["recent"], state["ridges"]["1"]["recent"])
