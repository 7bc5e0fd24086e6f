"""The memory of a process: how much of it an edit took at its peak, and what the process keeps of it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

MB = 1024 * 1024
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


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


def keep_freed() -> None:
    """Keep what is freed for what comes next, in a process that does nothing but one kind of work.

    glibc gives a large block back to the system as soon as it is freed, and the system clears every page of the next one: a tenth of the
    time of small models on a CPU. Without glibc nothing changes.
    """
    if set_option := getattr(_libc(), "mallopt", None):
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 * MB)):
            set_option(option, value)


def give_back() -> None:
    """Give what was kept back to the system: what comes next is to be measured without it."""
    if trim := getattr(_libc(), "malloc_trim", None):
        trim(0)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
