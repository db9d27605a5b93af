"""By how much memory grows at its peak, and how many kernels are launched."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from .problem import Implementation
from .timing import eager_turn

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_megabytes(implementation: Implementation, phase: str, device: torch.device) -> float | None:
    """MB (10^6 bytes) that one run needs beside its arguments; None where the system does not say.

    On a GPU what torch's allocator has handed out. On a CPU the growth of the process's resident memory, free memory
    having been given back to the system first: needs Linux and glibc.
    """
    turn = eager_turn(implementation, phase)
    state = turn.setup()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn.action(state)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    trim = _trim()
    if trim is None:
        return None
    trim(0)
    _CLEAR.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    turn.action(state)
    return max(_resident("VmHWM") - before, 0) * 1024 / 1e6


def launches(implementation: Implementation, phase: str, device: torch.device) -> int | None:
    """Kernels, copies and fills that one run puts on a GPU; None on a CPU, and where the profiler sees none."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    turn = eager_turn(implementation, phase)
    state = turn.setup()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        turn.action(state)
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ()) or None


def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, or None."""
    try:
        _CLEAR.open("w").close()
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def _resident(field: str) -> int:
    """In kB, as Linux counts this process's memory."""
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field))
