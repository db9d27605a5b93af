"""Microseconds of several actions that take turns, each with cold caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from ..benchmarks.events import Backlog

WARM_UP = 3

# more than any L2; clearing it on a GPU also takes as long as a launch or two
_FLUSH = {"cpu": 2**20, "cuda": 2**30}  # bytes

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    actions: Mapping[Name, Callable[[], object]], device: torch.device, rounds: int
) -> dict[Name, list[float]]:
    """Microseconds of each action in each round: CUDA's events on a GPU, of what it does alone; the clock elsewhere."""
    backlog = Backlog(torch.empty(_FLUSH[device.type], dtype=torch.int8, device=device), clears=1)
    names = list(actions)
    found: dict[Name, list[float]] = {name: [] for name in names}
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        for action in actions.values():
            action()
    for number in range(rounds):
        shift = number % len(names)  # everyone follows everyone
        readings = {name: _take(actions[name], device, backlog) for name in names[shift:] + names[:shift]}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for name, read in readings.items():
            found[name].append(read())
    return found


def _take(action: Callable[[], object], device: torch.device, backlog: Backlog) -> Callable[[], float]:
    """Runs it; gives a function that reads the microseconds, on a GPU once it is done."""
    if device.type == "cuda":
        milliseconds = backlog.take(lambda: None, lambda _: action())
        return lambda: 1e3 * milliseconds()
    backlog.buffer.zero_()
    begun = time.perf_counter()
    action()
    took = 1e6 * (time.perf_counter() - begun)
    return lambda: took
