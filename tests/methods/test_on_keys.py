"""Adam on a change that always meets the same keys is torch's Adam on the whole matrix."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.methods.on_keys import OnKeys


@settings(deadline=None, max_examples=200)
@given(
    texts=st.integers(1, 3),
    tokens=st.integers(1, 6),
    rates=st.lists(st.sampled_from([1e-3, 4e-2, 1.0]), min_size=0, max_size=6),
    silent=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_the_steps_are_torchs(texts: int, tokens: int, rates: list[float], silent: set[int], seed: int) -> None:
    """Also where a step's gradient is nothing (an objective that clips), and where texts lose their padding on the way."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(texts, tokens + 2, 7, generator=draw, dtype=torch.float64)
    change, whole = OnKeys(keys, 5), torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([whole])
    torch.testing.assert_close(change.made(), torch.zeros(texts, tokens + 2, 5, dtype=torch.float64), atol=0, rtol=0)
    torch.testing.assert_close(change.value, whole.detach(), atol=0, rtol=0)
    width = tokens + 2
    for number, rate in enumerate(rates):
        felt = torch.randn(texts, width, 5, generator=draw, dtype=torch.float64) * (number not in silent)
        felt[:, tokens:] = 0  # padding: what a change makes of it is not felt
        adam.param_groups[0]["lr"] = rate
        whole.grad = torch.einsum("ftd,ftk->dk", felt, keys[:, :width])
        adam.step()
        change.step(felt, rate)
        if number == 1:
            width = tokens
            change.cut(width)
        torch.testing.assert_close(change.value, whole.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(change.made(), keys[:, :width] @ whole.detach().T, rtol=1e-6, atol=1e-9)
