"""How much memory an edit took at its peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

MB = 1024 * 1024


def watch_peak(device: torch.device) -> Callable[[], float]:
    """Start watching; the returned function gives the peak since then, in MB.

    On a GPU: what torch held there. On a CPU: the resident set of the whole process, model and libraries with it; where the
    kernel keeps no peak that can be set back (anything but Linux), the resident set at the end.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / MB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present size
    except OSError:
        return _resident
    return _high_water_mark


def _high_water_mark() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return _resident()


def _resident() -> float:
    return float(psutil.Process().memory_info().rss) / MB
