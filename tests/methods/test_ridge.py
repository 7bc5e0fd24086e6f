"""The write rule against dense solves in float64: one fact and batches, with and without history, in its low-rank and its dense form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.methods.locate.ridge import EVEN, Prior, Ridge, Rows, identity_prior, inverse_prior, null_space_prior

D_IN, D = 24, 6
NEVER = 10**9


def rows(number: int, seed: int, width: int = D_IN) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def corpus(width: int = D_IN) -> Tensor:
    """C of ordinary keys, some directions of which are hardly used."""
    k = rows(400, 1, width) * torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return k.T @ k / len(k)


def null_space(width: int = D_IN) -> Tensor:
    """P [d_in, d_in] on the little used half of the directions."""
    _, vectors = torch.linalg.eigh(corpus(width))
    u = vectors[:, : width // 2]
    return u @ u.T


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


# what a rule is: its prior; and the dense solve of the same rule for (earlier keys, keys)
WEIGHT, L2 = 50.0, 10.0
REGULAR = corpus() + 1e-8 * corpus().diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)


def memit(earlier: Tensor, keys: Tensor) -> Tensor:
    return torch.linalg.solve(WEIGHT * REGULAR + earlier.T @ earlier + keys.T @ keys, keys.T).T


def alphaedit(earlier: Tensor, keys: Tensor) -> Tensor:
    p = null_space()
    system = p @ (earlier.T @ earlier + keys.T @ keys) + L2 * torch.eye(D_IN, dtype=torch.float64)
    return torch.linalg.solve(system, p @ keys.T).T


def rome(earlier: Tensor, keys: Tensor) -> Tensor:
    """Least Δ in the metric A + HHᵀ with ΔK = R, by Lagrange multipliers: [[A + HHᵀ, K], [Kᵀ, 0]] (β; μ) = (0; I)."""
    number = len(keys)
    system = torch.zeros(D_IN + number, D_IN + number, dtype=torch.float64)
    system[:D_IN, :D_IN] = REGULAR + earlier.T @ earlier
    system[:D_IN, D_IN:], system[D_IN:, :D_IN] = keys.T, keys
    wanted = torch.zeros(D_IN + number, number, dtype=torch.float64)
    wanted[D_IN:] = torch.eye(number, dtype=torch.float64)
    return torch.linalg.solve(system, wanted)[:D_IN].T


def project(x: Tensor) -> Tensor:
    return x @ null_space().to(x)


RULES = {
    "memit": (lambda: inverse_prior(corpus(), WEIGHT), 1.0, memit),
    "alphaedit": (lambda: null_space_prior(project, L2), 1.0, alphaedit),
    "rome": (lambda: inverse_prior(corpus()), 0.0, rome),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fold_at", [0, 5, NEVER])
@pytest.mark.parametrize("facts", [1, 4])
def test_every_rule_equals_its_dense_solve(rule: str, fold_at: int, facts: int) -> None:
    prior, slack, dense = RULES[rule]
    ridge = Ridge(prior(), D_IN, slack, fold_at)
    earlier = torch.empty(0, D_IN, dtype=torch.float64)
    for edit in range(12):
        keys = rows(facts, 100 + edit)
        beta = ridge.solve(keys)
        assert relative(beta, dense(earlier, keys)) < 1e-9
        assert torch.equal(beta, ridge.solve(keys))  # solving leaves no trace
        kept = keys if edit % 2 else rows(facts, 200 + edit)  # what is remembered need not be what was solved with
        ridge.remember(kept)
        earlier = torch.cat([earlier, kept])
    assert ridge.count == len(earlier)
    assert ridge.folded == (fold_at < NEVER)


@pytest.mark.parametrize("prior", [identity_prior, inverse_prior(corpus())])
def test_slack_zero_is_equality_and_the_published_rome_for_one_fact(prior: Prior) -> None:
    ridge = Ridge(prior, D_IN, slack=0)
    keys, residuals = rows(5, 3), rows(5, 4, D)
    delta = residuals.T @ ridge.solve(keys)  # [d, d_in]
    assert torch.allclose(delta @ keys.T, residuals.T, rtol=0, atol=1e-10)
    (k,), u = keys[:1], prior(keys[:1])[0]
    assert torch.allclose(ridge.solve(keys[:1])[0], u / (u @ k), rtol=1e-12, atol=0)


def test_memit_with_a_vanishing_weight_is_rome() -> None:
    keys = rows(3, 5)
    wanted = Ridge(inverse_prior(corpus()), D_IN, slack=0).solve(keys)
    errors = [relative(Ridge(inverse_prior(corpus(), weight), D_IN).solve(keys), wanted) for weight in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def test_the_null_space_keeps_ordinary_keys_as_they_were() -> None:
    ridge = Ridge(null_space_prior(project, L2), D_IN)
    for edit in range(20):
        ridge.remember(rows(2, edit))
    delta = rows(3, 6, D).T @ ridge.solve(rows(3, 7))
    ordinary = rows(50, 8) - project(rows(50, 8))
    assert float(delta.norm()) > 0.1
    assert float((delta @ ordinary.T).abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(9)), cuts=st.sets(st.integers(1, 8)), fold_at=st.integers(0, 12), rule=st.sampled_from(sorted(RULES)))
def test_neither_order_nor_grouping_nor_folding_changes_what_is_remembered(
    order: list[int], cuts: set[int], fold_at: int, rule: str
) -> None:
    prior, slack, _ = RULES[rule]
    keys, current = rows(9, 9), rows(2, 10)
    straight, shuffled = Ridge(prior(), D_IN, slack, NEVER), Ridge(prior(), D_IN, slack, fold_at)
    straight.remember(keys)
    for part in torch.tensor_split(keys[order], sorted(cuts)):
        shuffled.remember(part)
    assert relative(shuffled.solve(current), straight.solve(current)) < 1e-8


def test_remembering_what_was_just_solved_costs_no_second_pass_over_the_prior() -> None:
    calls = 0

    def counting(keys: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return keys

    for slack in (1.0, 0.0):
        ridge, plain = Ridge(counting, D_IN, slack, NEVER), Ridge(identity_prior, D_IN, slack, NEVER)
        keys, calls = rows(3, 11), 0
        ridge.solve(keys)
        ridge.remember(keys)
        assert calls == 1
        plain.remember(keys)
        assert torch.equal(plain.solve(rows(2, 12)), ridge.solve(rows(2, 12)))
        changed = rows(2, 13)
        ridge.solve(changed)
        changed.mul_(2)  # the caller's tensor is not what was solved with any more
        ridge.remember(changed)
        plain.remember(changed)
        assert relative(ridge.solve(rows(2, 12)), plain.solve(rows(2, 12))) < 1e-12


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("fold_at", [0, NEVER])
def test_what_was_solved_says_what_is_to_be_remembered(fold_at: int, dtype: torch.dtype, error: float) -> None:
    """β, also as it stands in an edit, and L in the place of the keys: of single facts, of batches, of a key that comes back."""
    straight, recalled = (Ridge(null_space_prior(identity_prior, 0.1), D_IN, fold_at=fold_at) for _ in range(2))
    for edit, facts in enumerate([1, 3, 2, 1, 5, 1]):
        keys = rows(facts, 0 if edit == 3 else edit)
        straight.solve(keys)
        straight.remember(keys)
        beta = recalled.solve(keys).to(dtype)
        factor = recalled.solved(beta, 1e-3)
        assert factor is not None
        recalled.recall(beta, factor)
    assert recalled.count == straight.count == 13
    for current in (rows(1, 0), rows(4, 9)):
        assert relative(recalled.solve(current), straight.solve(current)) < error


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.003, 1.0), st.floats(1.0, 1e4), st.integers(0, 10_000))
def test_a_rounded_beta_is_taken_only_where_it_says_enough(facts: int, spread: float, share: float, seed: int) -> None:
    """Keys of one edit that are nearly the same make a β that is large and cancels: its rounding, measured on M as it is afterwards."""
    base = torch.nn.functional.normalize(rows(1, seed), dim=1)
    keys = base + spread * rows(facts, seed + 1) / D_IN**0.5
    exact, rounded = (Ridge(null_space_prior(identity_prior, 1 / share), D_IN) for _ in range(2))
    exact.solve(keys)
    exact.remember(keys)
    beta = rounded.solve(keys).float()
    factor = rounded.solved(beta, 1e-3)
    if factor is None:
        assert facts > 1 or share > 1e2
        return
    rounded.recall(beta, factor)
    whole, off = (ridge._apply(torch.eye(D_IN, dtype=torch.float64)) for ridge in (exact, rounded))
    scale = torch.linalg.cholesky(whole)
    half = torch.linalg.solve_triangular(scale, off - whole, upper=False)
    assert float(torch.linalg.matrix_norm(torch.linalg.solve_triangular(scale, half.T, upper=False), 2)) < 1e-3


@pytest.mark.parametrize(("width", "memory"), [(EVEN, 8 * EVEN**2), (EVEN + 1, 8 * (EVEN + 1) * 16)])
def test_only_narrow_keys_cost_the_same_from_the_first_on(width: int, memory: int) -> None:
    """Beyond, a dense matrix for one key would be out of all proportion: a row, with room for 15 more."""
    ridge = Ridge(identity_prior, width)
    ridge.remember(rows(1, 30, width))
    assert ridge.folded == (width == EVEN) and ridge.nbytes == memory


@pytest.mark.parametrize("fold_at", [None, 4, NEVER])
@pytest.mark.parametrize("between", ["solve and remember", "edits"])
def test_a_history_saved_and_loaded_goes_on_bit_for_bit(fold_at: int | None, between: str) -> None:
    def make() -> Ridge:
        return Ridge(null_space_prior(project, L2), D_IN, fold_at=fold_at)

    straight, found = make(), []
    broken = make()
    for edit in range(50):
        keys = rows(1, 20 + edit)
        first = straight.solve(keys)
        straight.remember(keys)
        second = broken.solve(keys)
        if between == "edits":
            broken.remember(keys)
        state, broken = broken.state_dict(), make()
        broken.load_state_dict(state)
        if between != "edits":
            broken.remember(keys)
        found.append(torch.equal(first, second))
    assert all(found) and broken.count == straight.count == 50
    assert broken.folded == straight.folded == (fold_at != NEVER)


def test_a_state_is_a_copy_and_of_one_width() -> None:
    ridge = Ridge(identity_prior, D_IN, fold_at=3)
    ridge.remember(rows(2, 1))
    state = ridge.state_dict()
    ridge.remember(rows(2, 2))
    assert state["count"] == len(state["recent"]) == 2 and state["dense"] is None
    state = ridge.state_dict()
    before = state["dense"].clone()
    ridge.remember(rows(40, 3))
    assert state["count"] == 4 and torch.equal(state["dense"], before)
    with pytest.raises(ValueError, match="width 24, this layer's have 12"):
        Ridge(identity_prior, 12).load_state_dict(state)


def test_equality_refuses_dependent_keys_and_names_them() -> None:
    ridge = Ridge(inverse_prior(corpus()), D_IN, slack=0)
    keys = rows(4, 14)
    keys[3] = 2 * keys[1] + 1e-9 * rows(1, 15)[0]
    with pytest.raises(ValueError, match="facts 1 and 3"):
        ridge.solve(keys)
    assert ridge.solve(keys[:3]).isfinite().all()
    scaled = rows(2, 16) * torch.tensor([[1e-4], [1e4]], dtype=torch.float64)  # of unlike sizes is not dependent
    assert torch.allclose(ridge.solve(scaled) @ scaled.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-8)
    invisible = Ridge(null_space_prior(project, 1.0), D_IN, slack=0)
    with pytest.raises(ValueError, match="fact 1 of the batch has a key that the prior maps to zero"):
        invisible.solve(torch.stack([rows(1, 17)[0], torch.zeros(D_IN, dtype=torch.float64)]))


def test_with_slack_the_same_key_twice_shares_its_residuals() -> None:
    """Two facts with one key cannot both have their way: with slack the key gets the mean."""
    key, residuals = rows(1, 18), rows(2, 19, D)
    ridge = Ridge(inverse_prior(corpus(), 1e-6), D_IN)
    delta = residuals.T @ ridge.solve(key.repeat(2, 1))
    assert relative((delta @ key.T)[:, 0], residuals.mean(0)) < 1e-4


def test_what_cannot_be_solved_is_said() -> None:
    ridge = Ridge(identity_prior, D_IN)
    with pytest.raises(ValueError, match=r"keys must be \[facts, 24\]"):
        ridge.solve(torch.ones(D_IN))
    with pytest.raises(ValueError, match="finite"):
        ridge.remember(torch.full((1, D_IN), torch.nan))
    with pytest.raises(ValueError, match="at least 0"):
        Ridge(identity_prior, D_IN, slack=-1.0)
    with pytest.raises(ValueError, match="L2 must be above 0"):
        null_space_prior(project, 0.0)
    with pytest.raises(ValueError, match="positive semi-definite"):
        inverse_prior(-corpus())
    with pytest.raises(ValueError, match="square"):
        inverse_prior(rows(3, 1))
    assert torch.equal(ridge.solve(torch.zeros(2, D_IN)), torch.zeros(2, D_IN, dtype=torch.float64))


def test_moments_with_unused_units_are_inverted_with_a_ceiling() -> None:
    moment = corpus()
    moment[3], moment[:, 3] = 0, 0  # a ReLU unit that the corpus never switched on
    unit = torch.zeros(1, D_IN, dtype=torch.float64)
    unit[0, 3] = 1
    assert float(inverse_prior(moment, 2.0)(unit)[0, 3]) == pytest.approx(1 / (2e-8 * float(moment.diagonal().mean())))
    assert inverse_prior(moment)(unit.float()).dtype == torch.float32


def test_rows_grow_without_copying_the_whole_each_time() -> None:
    grown, buffers = Rows(3, torch.float64), set()
    for i in range(2_000):
        grown.append(rows(1, i, 3))
        buffers.add(grown.tensor.data_ptr())
    assert len(grown) == 2_000 and len(buffers) < 20
    assert torch.equal(grown.tensor, torch.cat([rows(1, i, 3) for i in range(2_000)]))


@pytest.mark.parametrize(
    ("rule", "dtype", "bound"),
    [
        ("alphaedit", torch.float64, 1e-10),
        ("memit", torch.float64, 1e-8),
        ("alphaedit", torch.float32, 1e-3),
        ("memit", torch.float32, 1e-1),
    ],
)
@pytest.mark.parametrize("fold_at", [0, 48, NEVER])
def test_five_thousand_keys_leave_it_close_to_the_dense_solve(rule: str, dtype: torch.dtype, bound: float, fold_at: int) -> None:
    """T is 52 times d_in: every key lies in the span of the history. Fresh keys, and a set of forty that come again and again."""
    width, total = 96, 5_000
    generator = torch.Generator().manual_seed(2)
    p, c, eye = null_space(width), corpus(width), torch.eye(width, dtype=torch.float64)
    prior = inverse_prior(c, WEIGHT) if rule == "memit" else null_space_prior(lambda x: x @ p.to(x), L2)
    fixed, mask = (WEIGHT * (c + 1e-8 * c.diagonal().mean() * eye), eye) if rule == "memit" else (L2 * eye, p)
    few = rows(40, 30, width)
    ridge = Ridge(prior, width, fold_at=fold_at, dtype=dtype)
    history = torch.zeros_like(c)
    for step in range(1, total + 1):
        key = few[step // 2 % 40].unsqueeze(0) if step % 2 else torch.randn(1, width, generator=generator, dtype=torch.float64)
        beta = ridge.solve(key)
        if step % 500 == 0 or step in (1, 10, 100):
            for k, found in ((key, beta), (few[:1], ridge.solve(few[:1]))):
                dense = torch.linalg.solve(fixed + mask @ (history + k.T @ k), mask @ k.T).T
                assert relative(found.double(), dense) < bound, step
            ridge.solve(key)
        ridge.remember(key)
        history += key.T @ key
