"""What the device itself can do: bytes copied and floating-point operations of a product in a second, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .cases import DTYPES

_COPY = {"cpu": 128 * 2**20, "cuda": 2**30}  # bytes
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
_TRIES, _SECONDS = (3, 30), 0.5  # at least and at most, and when no further one begins


@dataclass(frozen=True)
class Rates:
    """gigabytes: read and written a second by a copy. teraflops: dtype -> of a square product."""

    gigabytes: float
    teraflops: dict[str, float]


def measure(device: torch.device, dtypes: Sequence[str] = tuple(DTYPES)) -> Rates:
    """The best of several tries on `device`, with the threads that torch uses now."""
    kind = device.type if device.type in _COPY else "cpu"
    source = torch.ones(_COPY[kind] // 4, device=device)
    target = torch.empty_like(source)
    gigabytes = 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9
    side = _SIDE[kind]
    teraflops = {}
    for name in dtypes:
        a, b = torch.randn(2, side, side, device=device).to(DTYPES[name])
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out), device)  # type: ignore[misc]
        teraflops[name] = 2 * side**3 / seconds / 1e12
    return Rates(gigabytes, teraflops)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs."""
    found: list[float] = []
    while len(found) < _TRIES[0] or (len(found) < _TRIES[1] and sum(found) < _SECONDS):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
