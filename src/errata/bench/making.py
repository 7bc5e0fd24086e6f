"""One edit, made under a seed of its own and watched, and applied for good: what it took, and what of it goes into a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.bench.memory import watch_peak
from errata.edits import DenseDelta, Stack
from errata.lm.capture import submodule

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.lm import LanguageModel


class Made(NamedTuple):
    """An edit, and what making it took: seconds, and MB at the peak (see `watch_peak`)."""

    edit: Edit
    seconds: float
    memory: float


def watched(device: torch.device, seed: int, make: Callable[[], Edit]) -> Made:
    """What `make` gives, with torch's own generators seeded for it and put back behind it. Raises what `make` raises."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        peak, clock = watch_peak(device), time.perf_counter()
        edit = make()
        wait_for(device)
        return Made(edit, time.perf_counter() - clock, peak())


def settle(lm: LanguageModel, edit: Edit) -> None:
    """Apply an edit that more are to follow. Those with whole matrices, or a memory, are folded: one an edit would soon outweigh the model.

    Raises FloatingPointError if that would leave weights that are not finite; then nothing is applied.
    """
    edit.apply()
    finite(lm, edit)
    if edit.memory is not None or any(isinstance(delta, DenseDelta) for delta in edit.deltas):
        Stack.of(lm).fold()
    wait_for(lm.device)


def finite(lm: LanguageModel, edit: Edit) -> None:
    """Raise FloatingPointError if an applied edit has left weights that are not finite; then it is taken out."""
    for path in dict.fromkeys(delta.path for delta in edit.deltas):
        weight: torch.Tensor = submodule(lm.model, path).weight  # type: ignore[assignment]  # the edit has been applied there
        if not weight.isfinite().all():
            edit.revert()
            raise FloatingPointError(f"the edit would leave {path} with weights that are not finite")


def short(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """What is one value; curves stay with the edit."""
    return {name: value for name, value in diagnostics.items() if isinstance(value, bool | int | float | str)}


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
