"""CUDA's events around launches that are all made before the device comes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

MOST = 8  # times as many clears as at first: the rest of the host's time is measured, if there is any

State = TypeVar("State")


class Backlog:
    """Work that keeps a GPU busy while the host launches what is timed; it also empties the caches.

    Args:
        buffer: written again and again. clears: how often at first; more once a launch has taken longer than that.
    """

    def __init__(self, buffer: torch.Tensor, clears: int) -> None:
        self.buffer, self.clears, self.most = buffer, clears, MOST * clears

    def take(self, setup: Callable[[], State], action: Callable[[State], object]) -> Callable[[], float]:
        """Runs both; gives a function that reads the milliseconds of `action`, once the device is done."""
        while True:
            state = setup()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self.clears):
                self.buffer.zero_()
            start.record()
            action(state)
            end.record()
            if self.clears >= self.most or not start.query():  # the device is not there yet
                return lambda: start.elapsed_time(end)
            self.clears = min(2 * self.clears, self.most)
