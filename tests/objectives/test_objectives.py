"""Objectives against Algorithm 1 written out token by token in float64, and against the statements the paper makes about it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from errata import objectives
from errata.objectives import CrossEntropy, Objective, Overtone


def algorithm_1(s: Tensor, y: int, o: Overtone, reference: Tensor | None = None) -> tuple[float, Tensor, bool, Tensor]:
    """Loss, gradient in s, active, π_tar of one token, line by line (Algorithm 1, eq. 3), in Python floats."""
    v = len(s)
    source = s if reference is None else reference
    pi = [math.exp(x) / math.fsum(math.exp(z) for z in s.tolist()) for x in s.tolist()]
    prior = source.tolist()
    mean = math.fsum(prior) / v
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in prior) / (v - 1))
    keep = [not o.filter or x > max(prior) - o.n_sigma * sigma or x == max(prior) for x in prior]
    total = math.fsum(math.exp(x) for x, k in zip(prior, keep, strict=True) if k)
    flt = [math.exp(x) / total if k else 0.0 for x, k in zip(prior, keep, strict=True)]
    tar = [o.lam * (k == y) + (1 - o.lam) * f for k, f in enumerate(flt)]
    if o.check and tar[y] < max(tar):
        tar = [float(k == y) for k in range(v)]
    kl = math.fsum(t * math.log(t / p) for t, p in zip(tar, pi, strict=True) if t > 0)
    epsilon = o.epsilon if o.clip else 0.0
    active = epsilon == 0 or kl > epsilon
    gradient = torch.tensor([(p - t) * active for t, p in zip(tar, pi, strict=True)], dtype=torch.float64)
    return max(kl, epsilon), gradient, active, torch.tensor(tar, dtype=torch.float64)


def problem(b: int = 3, t: int = 4, v: int = 40, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in all the regimes: unlikely targets, likely ones, and nearly certain ones; the last row has no target token."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, v, generator=g, dtype=torch.float64) * spread
    targets = torch.randint(v, (b, t), generator=g)
    logits.scatter_add_(-1, targets[..., None], torch.randint(0, 4, (b, t, 1), generator=g).double() * 3 * spread)
    mask = torch.rand(b, t, generator=g) < 0.8
    mask[-1] = False
    return logits, targets, mask


def with_gradient(objective: Objective, logits: Tensor, targets: Tensor, mask: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = objective.evaluate(logits, targets, mask, **kw)
    assert not value.active.requires_grad
    (gradient,) = torch.autograd.grad(value.loss.sum(), logits)
    return value.loss.detach(), gradient, value.active


switches = st.fixed_dictionaries({name: st.booleans() for name in ("clip", "dynamic", "check", "filter")})


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    epsilon=st.sampled_from([0.0, 0.01, 0.05, 0.5]),
    n_sigma=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    lam=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    reduction=st.sampled_from(["sum", "mean"]),
    switch=switches,
)
def test_is_algorithm_1(
    seed: int, spread: float, epsilon: float, n_sigma: float, lam: float, reduction: str, switch: dict[str, bool]
) -> None:
    objective = Overtone(epsilon, n_sigma, lam, reduction, **switch)
    logits, targets, mask = problem(seed=seed, spread=spread)
    reference = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=logits.dtype)
    loss, gradient, active = with_gradient(objective, logits, targets, mask, reference=reference)

    for b in range(len(logits)):
        tokens = [
            algorithm_1(logits[b, t], int(targets[b, t]), objective, None if objective.dynamic else reference[b, t]) if mask[b, t] else None
            for t in range(logits.shape[1])
        ]
        share = 1 / max(sum(x is not None for x in tokens), 1) if reduction == "mean" else 1.0
        assert loss[b].item() == pytest.approx(share * sum(x[0] for x in tokens if x), rel=1e-9, abs=1e-12)
        assert active[b].tolist() == [bool(x and x[2]) for x in tokens]
        for t, token in enumerate(tokens):
            expected = share * token[1] if token else torch.zeros_like(logits[b, t])
            torch.testing.assert_close(gradient[b, t], expected, rtol=1e-9, atol=1e-12)


def test_problem_reaches_every_regime() -> None:
    """The comparison above means something only if tokens are clipped, mixed and skipped in it."""
    logits, targets, mask = problem(b=8, t=8)
    seen = [algorithm_1(logits[b, t], int(targets[b, t]), Overtone()) for b, t in mask.nonzero().tolist()]
    assert {active for *_, active, _ in seen} == {True, False}
    assert {bool(tar.max() == 1) for *_, tar in seen} == {True, False}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduces_to_cross_entropy(reduction: str) -> None:
    """Prop. 3.1, in value and in gradient; cross-entropy itself against torch, edit by edit."""
    logits, targets, mask = problem()
    ce = with_gradient(CrossEntropy(reduction), logits, targets, mask)
    overtone = with_gradient(Overtone(epsilon=0, lam=1, reduction=reduction), logits, targets, mask)
    torch.testing.assert_close(overtone, ce)
    assert torch.equal(ce[2], mask)
    for b in range(2):
        expected = F.cross_entropy(logits[b][mask[b]], targets[b][mask[b]], reduction=reduction)
        torch.testing.assert_close(ce[0][b], expected)
    assert ce[0][2] == 0 == ce[1][2].abs().max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), lam=st.floats(0, 1), n_sigma=st.floats(0, 3), spread=st.floats(0.01, 5))
def test_target_is_a_distribution_led_by_y(seed: int, lam: float, n_sigma: float, spread: float) -> None:
    """Read off the gradient: π_tar = π − gradient of an unclipped token."""
    logits, targets, mask = problem(seed=seed, spread=spread)
    mask = torch.ones_like(mask)
    _, gradient, _ = with_gradient(Overtone(epsilon=0, lam=lam, n_sigma=n_sigma), logits, targets, mask)
    target = logits.softmax(-1) - gradient
    assert target.min() > -1e-12
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
    assert (target.gather(-1, targets[..., None]).squeeze(-1) >= target.amax(-1) - 1e-12).all()


@pytest.mark.parametrize(
    ("logits", "n_sigma", "kept"),
    [
        ([1.0, 0.0, -1.0], 1.0, 1),  # σ = 1 exactly: a logit n σ below the largest goes
        ([1.0, 0.0, -1.0], 1.01, 2),
        ([0.0, -1.0, -2.0, -3.0], 0.8, 2),  # σ = 1.291 with V − 1; 1.118 with V would leave one
        ([5.0, 5.0, 5.0, 5.0], 0.5, 4),  # σ = 0: all are the largest
        ([2.0, 2.0, -9.0], 0.0, 2),
        ([3.0], 0.5, 1),
    ],
)
def test_what_the_filter_keeps(logits: list[float], n_sigma: float, kept: int) -> None:
    """λ = 0 and y the arg-max: the target is π_flt itself."""
    s = torch.tensor([[logits]], dtype=torch.float64)
    where = torch.zeros(1, 1, dtype=torch.long)
    _, gradient, _ = with_gradient(Overtone(epsilon=0, n_sigma=n_sigma, lam=0), s, where, where == 0)
    expected = torch.zeros_like(s)
    expected[..., :kept] = s[..., :kept].softmax(-1)
    torch.testing.assert_close(s.softmax(-1) - gradient, expected)


def test_clipped_tokens_are_still_and_finished_edits_are_told() -> None:
    logits, targets, mask = torch.zeros(3, 2, 30), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    logits[0, :, 0] = 50.0  # both tokens are certain
    logits[1, 0, 0] = 50.0  # one of two
    mask[2] = False
    objective = Overtone(epsilon=0.05)
    loss, gradient, active = with_gradient(objective, logits, targets, mask)
    assert active.tolist() == [[False, False], [False, True], [False, False]]
    assert objective.evaluate(logits, targets, mask).finished.tolist() == [True, False, True]
    assert torch.count_nonzero(gradient[~active]) == 0 and torch.count_nonzero(gradient[active]) > 0
    assert loss[0].item() == pytest.approx(0.1) and loss[2] == 0  # a clipped token counts ε, a missing one nothing


def test_target_moves_with_the_model_unless_static() -> None:
    logits, targets, mask = problem()
    moved = logits + torch.linspace(0, 3, logits.shape[-1], dtype=logits.dtype)
    dynamic, static = Overtone(epsilon=0), Overtone(epsilon=0, dynamic=False)
    assert static.needs_reference and not dynamic.needs_reference
    torch.testing.assert_close(static(logits, targets, mask, logits), dynamic(logits, targets, mask))
    assert not torch.allclose(static(moved, targets, mask, logits), dynamic(moved, targets, mask))
    with pytest.raises(ValueError, match="needs `reference`"):
        static(logits, targets, mask)
    with pytest.raises(ValueError, match="shape of the logits"):
        static(logits, targets, mask, logits[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", [CrossEntropy(), Overtone(), Overtone(dynamic=False)], ids=["ce", "overtone", "static"])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype, objective: Objective) -> None:
    logits, targets, mask = problem(v=500)
    half = logits.to(dtype)
    loss, gradient, active = with_gradient(objective, half, targets, mask, reference=half)
    exact = with_gradient(objective, half.double(), targets, mask, reference=half.double())
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, exact[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact[1].to(dtype), rtol=2e-2, atol=1e-6)
    assert torch.equal(active, exact[2])


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_extreme_logits_stay_finite(offset: float) -> None:
    """A target far below float32's smallest probability, a certain target, equal logits: finite, and right."""
    logits = torch.zeros(1, 3, 8) + offset
    logits[0, 0, 1], logits[0, 1, 0] = offset + 500, offset + 500
    loss, gradient, _ = with_gradient(Overtone(epsilon=0), logits, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    tar = [0.1 + 0.9 / 8, *[0.9 / 8] * 7]
    assert loss.item() == pytest.approx(500 + sum(t * math.log(8 * t) for t in tar), rel=1e-6)
    assert torch.isfinite(gradient).all()


def test_padding_may_hold_any_target_and_a_row_stands_alone() -> None:
    logits, targets, mask = problem()
    for objective in (CrossEntropy(), Overtone()):
        loss = objective(logits, targets, mask)
        torch.testing.assert_close(objective(logits, targets.masked_fill(~mask, -100), mask), loss)
        for b in range(len(logits)):
            torch.testing.assert_close(objective(logits[b : b + 1], targets[b : b + 1], mask[b : b + 1]), loss[b : b + 1])


class Elements(TorchDispatchMode):
    """Counts the elements that operations put out, and remembers the operations' names."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.count += sum(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("objective", [Overtone(), Overtone(dynamic=False)], ids=["dynamic", "static"])
def test_cost_is_linear_in_the_vocabulary(objective: Objective) -> None:
    """Prop. 3.2, counted: elements written double with V, and nothing sorts."""

    def count(v: int) -> int:
        logits, targets, mask = (x.float() if x.is_floating_point() else x for x in problem(b=2, t=2, v=v))
        with Elements() as elements:
            with_gradient(objective, logits, targets, mask, reference=logits)
        assert not {"sort", "topk", "kthvalue"} & elements.names
        return elements.count

    small, large = count(10_000), count(20_000)
    assert large / small == pytest.approx(2, rel=0.01)


def test_one_tensor_of_vocabulary_size_is_saved() -> None:
    logits, targets, mask = problem(v=2000)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Overtone()(logits.requires_grad_(), targets, mask)
    assert [n for n in saved if n >= 2000] == [logits.numel()]


class SoftmaxModel(torch.nn.Module):
    """Two layers and a softmax, in float64: the small model of the two theory checks."""

    def __init__(self, v: int = 17) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, v)).double()
            self.x = torch.randn(1, 3, 5, dtype=torch.float64)  # the contexts c_i of one edit
        self.y, self.mask = torch.tensor([[2, 11, 5]]), torch.ones(1, 3, dtype=torch.bool)

    def logits(self) -> Tensor:
        return self.net(self.x)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.net.parameters()))])


def filtered(logits: Tensor, n: float) -> Tensor:
    """π_flt, a constant."""
    logits = logits.detach()
    keep = logits > logits.amax(-1, keepdim=True) - n * logits.std(-1, keepdim=True)
    return logits.masked_fill(~keep, -math.inf).softmax(-1)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [0.5, 1.5])
def test_gradient_mixes_cross_entropies(lam: float, n: float) -> None:
    """Appendix A.3: ∇ℓ = λ a + (1 − λ) c, a = ∇CE[δ_y ‖ π_θ], c = ∇CE[π_flt ‖ π_θ], over the model's parameters (the theorem has ε = 0
    and no skip rule)."""
    model = SoftmaxModel()
    logits = model.logits()
    log_pi, flt = logits.log_softmax(-1), filtered(logits, n)
    a = model.gradient(-log_pi.gather(-1, model.y[..., None]).sum())
    c = model.gradient(-(flt * model.logits().log_softmax(-1)).sum())
    loss = Overtone(epsilon=0, n_sigma=n, lam=lam, check=False)(model.logits(), model.y, model.mask).sum()
    torch.testing.assert_close(model.gradient(loss), lam * a + (1 - lam) * c)
    assert (a - c).norm() > 0.1  # not the same direction twice


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_is_an_unbiased_estimate_of_dpo_plus_kl(lam: float) -> None:
    """Theorem 3.4 by Appendix A.4's derivation, exactly: with y ~ π⁺ in place of the one sample y_i, and y⁻ ~ π_flt,

        E_y[−ℓ] = E[λ log(π_θ(y⁺)/π_flt(y⁺)) − λ log(π_θ(y⁻)/π_flt(y⁻))] − KL[π_flt ‖ π_θ] + C

    with C constant in θ. (From the second display on the paper writes the penalty of an objective to be maximised with a plus, and ratios
    of probabilities as ratios of logarithms.) The expectation is a sum over the vocabulary; n is large enough that nothing is filtered,
    because the reference ratio of y⁺ needs π_flt(y⁺) > 0. Value and gradient are compared.
    """
    model, n = SoftmaxModel(), 20.0
    preferred = torch.randn(3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)  # π⁺ at each position
    flt = filtered(model.logits(), n)[0]
    objective = Overtone(epsilon=0, n_sigma=n, lam=lam, check=False)

    logits = model.logits()
    ours, constant = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for y in range(17):
            loss = objective(logits[:, i : i + 1], torch.tensor([[y]]), model.mask[:, :1]).sum()
            tar = lam * F.one_hot(torch.tensor(y), 17) + (1 - lam) * flt[i]
            ours = ours - preferred[i, y] * loss
            constant = constant - preferred[i, y] * torch.xlogy(tar, tar).sum()  # minus the target's negative entropy: no θ in it
    log_pi = model.logits()[0].log_softmax(-1)
    ratio = log_pi - flt.log()
    reward = lam * ((preferred * ratio).sum() - (flt * ratio).sum())
    penalty = torch.xlogy(flt, flt).sum() - (flt * log_pi).sum()
    constant = constant + lam * ((preferred - flt) * flt.log()).sum() + torch.xlogy(flt, flt).sum()
    torch.testing.assert_close(ours, reward - penalty + constant)
    torch.testing.assert_close(model.gradient(ours), model.gradient(reward - penalty))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be a finite number from 0 up"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"n_sigma": math.nan}, "n_sigma"),
        ({"lam": 1.5}, "lam must be a finite number from 0 to 1"),
        ({"lam": "0.1"}, "lam"),
        ({"clip": "no"}, "clip must be True or False"),
        ({"reduction": "avg"}, "reduction must be 'sum'"),
    ],
)
def test_settings_are_validated(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.get("overtone", **setting)


def test_registry() -> None:
    assert objectives.get("overtone", epsilon=0.01) == Overtone(epsilon=0.01)
    assert objectives.get("ce", reduction="sum") == CrossEntropy("sum")
    for name in objectives.NAMES:
        assert objectives.get(name).name == name and isinstance(objectives.get(name), Objective)
    with pytest.raises(ValueError, match="did you mean 'overtone'"):
        objectives.get("overton")
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        objectives.get("overtone", epsilonn=1)
    assert subprocess.run([sys.executable, "-c", "import errata.objectives, sys; sys.exit('torch' in sys.modules)"]).returncode == 0


def test_shapes_are_checked() -> None:
    logits, targets, mask = problem()
    wrong = {"logits": (logits[0], targets, mask), "targets": (logits, targets[:1], mask), "mask": (logits, targets, mask.long())}
    for name, inputs in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            Overtone()(*inputs)
