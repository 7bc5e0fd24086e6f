"""One edit, made under a seed of its own and watched: what it took, and what of its diagnostics goes into a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.bench.memory import watch_peak

if TYPE_CHECKING:
    from errata.edits import Edit


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


def short(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """What is one value; curves stay with the edit."""
    return {name: value for name, value in diagnostics.items() if isinstance(value, bool | int | float | str)}


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
