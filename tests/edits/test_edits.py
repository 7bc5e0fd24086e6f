"""Edits: exact apply and revert in any order, and a folder that comes back as it was saved or says why not."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.edits import DenseDelta, Edit, EditError, LowRankDelta, Replacement, Stack
from errata.edits.edit import RECORD, TENSORS, Trail
from errata.facts import Fact
from errata.lm import ModelError, encode
from tests import families

FACT = Fact.parse("The capital of {France} is -> Lyon")
OUT, IN = 6, 9


def make_lm(dtype: torch.dtype = torch.float32, seed: int = 0, fingerprint: str = "f" * 64) -> Any:
    """As much of a LanguageModel as edits see: two ordinary modules and one that stores its weight transposed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, OUT), "conv": Conv1D(OUT, IN)}).to(dtype)
    return SimpleNamespace(model=model, name="toy", fingerprint=fingerprint)


def weights(lm: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit: torch.equal takes -0 for 0."""
    for name in one:
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def some_deltas(seed: int) -> list[Any]:
    """Between one and five deltas, some on the same matrix, of sizes that rounding mixes up."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 10 ** torch.randint(-3, 2, (), generator=g).double().item()

    deltas: list[Any] = []
    for _ in range(int(torch.randint(1, 6, (), generator=g))):
        path = ("a", "b", "conv")[int(torch.randint(3, (), generator=g))]
        if torch.rand((), generator=g) < 0.5:
            deltas.append(DenseDelta(path, randn(IN, OUT) if path == "conv" else randn(OUT, IN)))
        else:
            deltas.append(LowRankDelta(path, randn(OUT, 2), randn(2, IN)))
    return deltas


def make_edit(lm: Any, seed: int = 0, **kw: Any) -> Edit:
    return Edit(lm, some_deltas(seed), [FACT], {"name": "toy", "lr": 0.1}, **kw)


@pytest.mark.parametrize("path", ["a", "conv"])
def test_low_rank_moves_the_output_by_left_right_x(path: str) -> None:
    """Whatever the orientation in which the module stores its weight."""
    lm, x = make_lm(torch.float64), torch.randn(4, IN, dtype=torch.float64)
    left, right = torch.randn(OUT, 2), torch.randn(2, IN)
    before = lm.model[path](x)
    with Edit(lm, [LowRankDelta(path, left, right)], [FACT], {}).applied_():
        after = lm.model[path](x)
    torch.testing.assert_close(after - before, x @ (left.double() @ right.double()).T)


def test_dense_is_added_as_stored() -> None:
    lm = make_lm()
    delta, before = torch.randn(IN, OUT), weights(lm)
    Edit(lm, [DenseDelta("conv", delta)], [FACT], {}).apply()
    assert torch.equal(lm.model["conv"].weight, before["conv.weight"] + delta)
    assert_same({"a.weight": before["a.weight"]}, weights(lm))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
    steps=st.lists(st.integers(0, 4), max_size=25),
)
def test_any_sequence_equals_building_from_scratch(dtype: torch.dtype, seed: int, steps: list[int]) -> None:
    """Each step toggles one of five edits; the weights are those of a fresh model with the active ones applied in their order."""
    lm = make_lm(dtype)
    base = weights(lm)
    edits, active = [make_edit(lm, seed + i) for i in range(5)], list[int]()
    for i in steps:
        if i in active:
            edits[i].revert()
            active.remove(i)
        else:
            edits[i].apply()
            active.append(i)
        assert [edit.applied for edit in edits] == [j in active for j in range(5)]
        scratch = make_lm(dtype)
        for j in active:
            make_edit(scratch, seed + j).apply()
        assert_same(weights(lm), weights(scratch))
    for i in active:
        edits[i].revert()
    assert_same(weights(lm), base)


def test_weights_are_the_float32_sum_cast_once() -> None:
    """500 small edits of a bfloat16 model: each alone is below a rounding step and would be lost if it were added in place."""
    lm = make_lm(torch.bfloat16)
    base = lm.model["a"].weight.detach().clone()
    step = base.float().abs() * 1e-3 + 1e-6
    edits = [Edit(lm, [DenseDelta("a", step)], [FACT], {}) for _ in range(500)]
    total, in_place = base.float(), base.clone()
    for edit in edits:
        edit.apply()
        total, in_place = total + step, in_place + step.to(torch.bfloat16)
    assert torch.equal(lm.model["a"].weight, total.to(torch.bfloat16))
    assert (in_place.float() - total).norm() > 0.1 * total.norm()


def test_apply_and_revert_refuse_twice() -> None:
    lm = make_lm()
    edit = make_edit(lm)
    with pytest.raises(EditError, match=r"Lyon.*is not applied; apply\(\) it first"):
        edit.revert()
    edit.apply()
    after = weights(lm)
    with pytest.raises(EditError, match=r"is applied already; revert\(\) it first"):
        edit.apply()
    assert_same(weights(lm), after)


def test_context_manager_always_reverts() -> None:
    lm = make_lm()
    base, edit = weights(lm), make_edit(lm)
    with pytest.raises(RuntimeError, match="inside"), edit.applied_():
        assert edit.applied
        raise RuntimeError("inside")
    assert not edit.applied
    with edit.applied_():
        edit.revert()
    assert_same(weights(lm), base)


def test_parameters_stay_themselves_and_trainable() -> None:
    """Optimisers and hooks hold the Parameter object; applying must not replace it."""
    lm = make_lm()
    parameter = lm.model["a"].weight
    Edit(lm, [DenseDelta("a", torch.ones(OUT, IN))], [FACT], {}).apply()
    assert lm.model["a"].weight is parameter and parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize(
    ("delta", "error", "message"),
    [
        (DenseDelta("conv", torch.zeros(OUT, IN)), EditError, r"weight of \[6, 9\]; that module's is \[9, 6\], stored as \[in, out\]"),
        (LowRankDelta("a", torch.zeros(IN, 1), torch.zeros(1, OUT)), EditError, "low_rank delta for 'a'"),
        (DenseDelta("nowhere", torch.zeros(OUT, IN)), ModelError, "nowhere"),
    ],
)
def test_what_does_not_fit_changes_nothing(delta: Any, error: type[Exception], message: str) -> None:
    lm = make_lm()
    base, edit = weights(lm), Edit(lm, [DenseDelta("a", torch.ones(OUT, IN)), delta], [FACT], {})
    with pytest.raises(error, match=message):
        edit.apply()
    assert not edit.applied
    assert_same(weights(lm), base)


def test_an_interrupted_apply_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm(torch.bfloat16)
    first, second = (Edit(lm, [DenseDelta(p, torch.ones(OUT, IN)) for p in paths], [FACT], {}) for paths in (("a",), ("a", "b")))
    first.apply()
    before, add = weights(lm), DenseDelta.add_

    def interrupted(self: DenseDelta, total: Tensor, transposed: bool) -> None:
        add(self, total, transposed)
        if self is second.deltas[1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(DenseDelta, "add_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.apply()
    assert first.applied and not second.applied
    assert_same(weights(lm), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseDelta("a.weight", torch.zeros(2, 2)), "write 'a' for 'a.weight'"),
        (lambda: DenseDelta("a", torch.zeros(2)), r"must be a floating-point matrix, got torch.float32 \[2\]"),
        (lambda: DenseDelta("a", torch.zeros(2, 2, dtype=torch.long)), "floating-point"),
        (lambda: DenseDelta("a", torch.zeros(2, 2, requires_grad=True)), "detach"),
        (lambda: LowRankDelta("a", torch.zeros(4, 2), torch.zeros(3, 5)), "one r"),
    ],
)
def test_bad_deltas_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EditError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = make_lm(dtype)
    shared = torch.randn(OUT, 4, dtype=torch.float64)
    strided = LowRankDelta("b", shared[:, ::2], shared.T[:2].repeat(1, 2)[:, :IN])  # views of one storage
    deltas = [*some_deltas(3), strided, DenseDelta("a", torch.ones(OUT, IN).bfloat16())]
    edit = Edit(lm, deltas, [FACT, Fact("x {} y", "Zoë", "é", "old")], {"name": "toy"}, {"name": "ce"}, {"losses": [1.5, 0.5]})
    edit.save(tmp_path / "new" / "edit")
    assert {p.name for p in (tmp_path / "new" / "edit").iterdir()} == {RECORD, TENSORS}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["edit"]  # no scratch left behind

    loaded = Edit.load(tmp_path / "new" / "edit", lm)
    for name in ("facts", "method", "objective", "diagnostics", "lm_fingerprint"):
        assert getattr(loaded, name) == getattr(edit, name)
    for one, other in zip(loaded.deltas, edit.deltas, strict=True):
        assert (one.kind, one.path) == (other.kind, other.path)
        for name, tensor in one.tensors().items():
            assert tensor.dtype == other.tensors()[name].dtype and torch.equal(tensor, other.tensors()[name])
    with edit.applied_():
        after = weights(lm)
    with loaded.applied_():
        assert_same(weights(lm), after)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, **changes}))

    return damage


def flip_a_bit(folder: Path) -> None:
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[-3] ^= 1
    (folder / TENSORS).write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / RECORD).unlink(), r"holds no edits \(edit\.json is missing\)"),
        (lambda folder: (folder / TENSORS).unlink(), r"holds no edits \(deltas\.safetensors is missing\)"),
        (lambda folder: (folder / RECORD).write_text('{"format": 1, "fac'), r"edit\.json is damaged"),
        (lambda folder: (folder / RECORD).write_bytes(b"\xff\xfe"), r"edit\.json is damaged"),
        (lambda folder: (folder / RECORD).write_text("[]"), r"edit\.json is damaged"),
        (rewrite(facts=["?"]), r"edit\.json is damaged"),
        (rewrite(deltas=[{"kind": "odd", "path": "a"}]), r"edit\.json is damaged.*odd"),
        (rewrite(deltas=[{"kind": "dense", "path": "a"}] * 9), r"deltas\.safetensors does not hold"),
        (rewrite(format=4, facts=None), r"edit\.json has format 4, this errata reads up to 3; install a newer"),
        (rewrite(model={"name": "other", "fingerprint": "0" * 64}), r"edit\.json was made for the model 'other' \(000000000000\)"),
        (flip_a_bit, r"deltas\.safetensors is damaged"),
        (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:50]), r"deltas\.safetensors is damaged"),
    ],
)
def test_load_says_what_is_wrong(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    lm = make_lm()
    make_edit(lm).save(tmp_path / "edit")
    Edit.load(tmp_path / "edit", lm)  # sound before
    damage(tmp_path / "edit")
    with pytest.raises(EditError, match=message):
        Edit.load(tmp_path / "edit", lm)


def test_save_is_all_or_nothing(tmp_path: Path) -> None:
    lm = make_lm()
    with pytest.raises(EditError, match="plain JSON values"):
        make_edit(lm, diagnostics={"loss": torch.zeros(1)}).save(tmp_path / "edit")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "edit").mkdir()
    make_edit(lm).save(tmp_path / "edit")  # an empty folder will do
    before = (tmp_path / "edit" / RECORD).read_bytes()
    with pytest.raises(EditError, match="exists already"):
        make_edit(lm, seed=9).save(tmp_path / "edit")
    assert (tmp_path / "edit" / RECORD).read_bytes() == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_on_real_models(tmp_path: Path, family: str) -> None:
    """Saved from one LanguageModel, loaded into another of the same weights, refused by a third."""
    lm, twin, stranger = (families.language_model(family, seed=seed) for seed in (0, 0, 1))
    down, key = lm.anatomy.mlp_down[1], lm.anatomy.key_size
    edit = Edit(lm, [LowRankDelta(down, torch.randn(families.HIDDEN, 1), torch.randn(1, key))], [FACT], {"name": "toy"})
    batch = lm.batch([encode(lm.tokenizer, FACT.text, FACT.target)])
    edit.save(tmp_path / "edit")
    before, base = lm.target_logits(batch), weights(lm)
    with edit.applied_():
        after = lm.target_logits(batch)
    assert_same(weights(lm), base)
    assert not torch.allclose(before, after)
    Edit.load(tmp_path / "edit", twin).apply()
    assert torch.equal(twin.target_logits(batch), after)
    with pytest.raises(EditError, match="made for the model"):
        Edit.load(tmp_path / "edit", stranger)


def test_two_language_models_around_one_model_share_its_edits() -> None:
    from errata.lm import LanguageModel
    from tests.families import language_model

    one = language_model("llama")
    two = LanguageModel(one.model, one.tokenizer)
    path = one.anatomy.mlp_down[0]
    weight = one.model.get_submodule(path).weight
    before = weight.detach().clone()
    draw = torch.Generator().manual_seed(0)
    first, second = (Edit(lm, [DenseDelta(path, torch.randn(weight.shape, generator=draw))], [], {"name": "t"}) for lm in (one, two))
    first.apply()
    second.apply()
    first.revert()
    assert torch.equal(weight, before + second.deltas[0].tensors()["tensor"])
    second.revert()
    assert torch.equal(weight, before)


WIDTHS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def running_sums(lm: Any, edits: list[Edit]) -> dict[str, Tensor]:
    """What `apply` of each in turn leaves, on a model of its own."""
    for edit in edits:
        Edit(lm, edit.deltas, edit.facts, {}).apply()
    return weights(lm)


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(WIDTHS), seed=st.integers(0, 1000), steps=st.lists(st.booleans(), min_size=1, max_size=8))
def test_folding_changes_no_bit_now_or_later(dtype: torch.dtype, seed: int, steps: list[bool]) -> None:
    """Each step applies an edit and may fold: the weights are those of a model that never folded."""
    lm, never = make_lm(dtype), make_lm(dtype)
    base, stack = weights(lm), Stack.of(lm)
    edits: list[Edit] = []
    for i, fold in enumerate(steps):
        edits.append(make_edit(lm, seed + i))
        edits[-1].apply()
        if fold:
            stack.fold()
            assert len(stack.active) == 1
        assert_same(weights(lm), running_sums(never, edits[-1:]))
        assert all(edit.applied for edit in edits)
    last = make_edit(lm, seed + 99)
    before = weights(lm)
    with last.applied_():  # reverting builds the sum again, from the fold on
        pass
    assert_same(weights(lm), before)
    with stack.aside_():
        assert_same(weights(lm), base)
    assert_same(weights(lm), before)
    stack.clear()
    assert_same(weights(lm), base)
    assert not any(edit.applied for edit in edits) and stack.touched == [] == stack.active


@pytest.mark.parametrize("dtype", WIDTHS[:2])
def test_a_folded_sequence_goes_on_from_its_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    """What a snapshot does: fold, save, load into a fresh model, apply; what comes after is the same to the last bit."""
    lm, fresh = make_lm(dtype), make_lm(dtype)
    for seed in range(4):
        make_edit(lm, seed).apply()
    folded = Stack.of(lm).fold()
    assert {tensor.dtype for delta in folded.deltas for tensor in delta.tensors().values()} == {torch.float32}
    folded.save(tmp_path / "folded")
    Edit.load(tmp_path / "folded", fresh).apply()
    assert_same(weights(fresh), weights(lm))
    for model in (lm, fresh):
        make_edit(model, 7).apply()
    assert_same(weights(fresh), weights(lm))


def test_folded_edits_leave_together_or_not_at_all() -> None:
    lm = make_lm()
    base, stack = weights(lm), Stack.of(lm)
    one, two = make_edit(lm, 0), make_edit(lm, 1)
    one.apply()
    two.apply()
    folded = stack.fold()
    later = Edit(lm, [DenseDelta("a", torch.ones(OUT, IN))], [FACT], {})
    later.apply()
    with pytest.raises(EditError, match="folded with others"):
        one.revert()
    with pytest.raises(EditError, match="applied already"):
        two.apply()
    folded.revert()
    assert not one.applied and not two.applied and later.applied
    assert_same(weights(lm), base | {"a.weight": base["a.weight"] + 1})


def test_folding_keeps_no_edit_alive() -> None:
    lm = make_lm()
    edit = make_edit(lm)
    edit.apply()
    gone = weakref.ref(edit)
    Stack.of(lm).fold()
    del edit
    gc.collect()
    assert gone() is None


def test_nothing_comes_or_goes_while_edits_are_aside() -> None:
    lm = make_lm(torch.bfloat16)
    edit, stack = make_edit(lm), Stack.of(lm)
    edit.apply()
    before = weights(lm)
    with pytest.raises(RuntimeError, match="inside"), stack.aside_():
        assert edit.applied
        for forbidden in (edit.revert, make_edit(lm, 1).apply, stack.fold, stack.clear):
            with pytest.raises(EditError, match="set aside"):
                forbidden()
        raise RuntimeError("inside")
    assert_same(weights(lm), before)


@pytest.mark.parametrize("dtype", WIDTHS)
@given(out=st.lists(st.integers(0, 6), max_size=4), fold=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_some_are_out_for_a_while(dtype: torch.dtype, out: list[int], fold: int) -> None:
    """The weights are those of the others alone, then those of all again; the last of these edits is not applied at all."""
    lm, others = make_lm(dtype), make_lm(dtype)
    edits = [make_edit(lm, seed) for seed in range(7)]
    stack = Stack.of(lm)
    stack.apply(*edits[:fold])
    if fold:
        stack.fold()
    stack.apply(*edits[fold:6])
    before, active = weights(lm), list(stack.active)
    if any(number < fold for number in out):
        with pytest.raises(EditError, match="was folded with others"), stack.without_([edits[number] for number in out]):
            pass
    else:
        with pytest.raises(RuntimeError, match="inside"), stack.without_([edits[number] for number in out]):
            for number in range(6):
                if number not in out:
                    make_edit(others, number).apply()
            assert_same(weights(lm), weights(others))
            with pytest.raises(EditError, match="set aside"):
                edits[6].apply()
            raise RuntimeError("inside")
    assert_same(weights(lm), before)
    assert stack.active == active
    stack.clear()
    assert_same(weights(lm), weights(make_lm(dtype)))


def test_a_replacement_wipes_what_was_there(tmp_path: Path) -> None:
    lm = make_lm(torch.bfloat16)
    wanted = torch.randn(IN, OUT)
    base = weights(lm)
    noise = Edit(lm, [DenseDelta("conv", torch.full((IN, OUT), torch.nan))], [FACT], {})
    noise.apply()
    with Edit(lm, [Replacement("conv", wanted)], [FACT], {}).applied_():
        assert torch.equal(lm.model["conv"].weight, wanted.bfloat16())
    assert lm.model["conv"].weight.isnan().all()
    noise.revert()
    assert_same(weights(lm), base)
    with pytest.raises(EditError, match="replacement delta for 'a'"):
        Edit(lm, [Replacement("a", wanted)], [FACT], {}).apply()


def test_what_an_edit_is_called_says_all_of_it() -> None:
    lm = make_lm()
    told = {
        "deltas": make_edit(lm, 1),
        "facts": Edit(lm, make_edit(lm).deltas, [Fact("Who is {}?", "Ann", "Ben")], {}),
        "trail": make_edit(lm, trail=Trail("abcd", {})),
        "another trail": make_edit(lm, trail=Trail("abce", {})),
        "as it is": make_edit(lm),
    }
    assert len({edit.content for edit in told.values()}) == len(told)
    assert make_edit(make_lm()).content == told["as it is"].content


def test_its_trail_travels_with_the_edit_and_its_keys_do_not(tmp_path: Path) -> None:
    lm = make_lm()
    trail = Trail("abcd", {"factor.1": torch.randn(3, 3, dtype=torch.float64), "keys.2": torch.randn(1, IN)})
    make_edit(lm, keys={"b": torch.randn(3, IN)}, trail=trail).save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", lm)
    assert loaded.trail is not None and loaded.trail.after == "abcd" and loaded.keys == {}
    assert loaded.trail.tensors.keys() == trail.tensors.keys()
    assert all(torch.equal(loaded.trail.tensors[name], tensor) for name, tensor in trail.tensors.items())
    record = json.loads((tmp_path / "edit" / RECORD).read_text())
    del record["after"]  # an edit of before there were any
    (tmp_path / "edit" / RECORD).write_text(json.dumps(record))
    assert Edit.load(tmp_path / "edit", lm).trail is None
    with pytest.raises(EditError, match="keys for 'a' must be a floating-point matrix"):
        make_edit(lm, keys={"a": torch.zeros(IN)})
