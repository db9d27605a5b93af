"""Milliseconds of several implementations that take turns, each with cold caches."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .events import Backlog
from .problem import Implementation

TIMERS = ("auto", "host", "events", "graph")
WARM_UP = 3
LEAST_ROUNDS, MOST_ROUNDS = 5, 100

_FLUSH = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # bytes: more than a core's own caches, than any GPU's


@dataclass(frozen=True)
class Turn:
    """What is timed, and what has to be done before: `action` gets what `setup` gives."""

    setup: Callable[[], Any]
    action: Callable[[Any], Any]


@dataclass(frozen=True)
class Times:
    """milliseconds: of each round. timer: "host", "events" or "graph". note: why not the timer that auto prefers."""

    milliseconds: list[float]
    timer: str
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one; the median twice where there is a single round."""
        if len(self.milliseconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return low, high


class Timer:
    """Times on one device.

    Args:
        how: "host" reads the clock, "events" are CUDA's around the eager call, with the time that the GPU waits for
            Python and launches, "graph" replays a CUDA graph, without it; "auto" is "graph" where every implementation
            can be captured, else "events", and "host" on a CPU.
        warm: leave the caches as the last turn left them; a graph's time then has that of its launch.

    Raises:
        ValueError: `how` is none of these, or not for that device.
    """

    def __init__(self, device: torch.device, how: str = "auto", warm: bool = False) -> None:
        if how not in TIMERS:
            raise ValueError(f"timer: got {how!r}, wants one of {', '.join(TIMERS)}")
        if device.type != "cuda" and how in ("events", "graph"):
            raise ValueError(f"timer: got {how!r} on {device.type}, wants host or auto")
        self.device, self.how = device, how
        size = 0 if warm else _FLUSH.get(device.type, _FLUSH["cpu"])
        self.flushed = size
        self._cache = torch.empty(size, dtype=torch.int8, device=device)
        self._backlog = Backlog(self._cache, clears=4)

    def compare(
        self,
        implementations: Mapping[str, Implementation],
        phase: str,
        rounds: int | None = None,
        seconds: float = 1.0,
        as_run: bool = False,
    ) -> dict[str, Times]:
        """Times of each, round by round in turn, so that whatever else happens meets all of them.

        Args:
            phase: "forward", "backward" (the forward pass before it is not timed) or "both".
            rounds: how many; None takes about `seconds` for all, but 5 rounds at least.
            as_run: the host's time belongs to it: "auto" is then "events" on a GPU.
        """
        turns, timer, note = self._turns(implementations, phase, as_run)
        start = time.perf_counter()
        for _ in range(WARM_UP):
            self._round(turns, timer, 0)
            if time.perf_counter() - start > 2 * seconds:  # a slow one has no more to warm up
                break
        start = time.perf_counter()
        found = self._round(turns, timer, 0)
        if rounds is None:
            took = time.perf_counter() - start
            rounds = min(max(int(seconds / took), LEAST_ROUNDS), MOST_ROUNDS)
        all_rounds = [found, *(self._round(turns, timer, number) for number in range(1, rounds))]
        return {name: Times([each[name] for each in all_rounds], timer, note) for name in turns}

    def _turns(
        self, implementations: Mapping[str, Implementation], phase: str, as_run: bool
    ) -> tuple[dict[str, Turn], str, str]:
        eager = {name: eager_turn(of, phase) for name, of in implementations.items()}
        if self.device.type != "cuda" or self.how == "host":
            return eager, "host", ""
        if self.how == "events" or (self.how == "auto" and as_run):
            return eager, "events", ""
        captured = {}
        for name, of in implementations.items():
            try:
                captured[name] = captured_turn(of, phase)
            except Exception as error:  # whatever in a foreign implementation does not bear capture
                if self.how == "graph":
                    raise RuntimeError(f"timer: {name} cannot be captured in a CUDA graph: {error}") from error
                torch.cuda.synchronize(self.device)
                return eager, "events", f"events, because {name} cannot be captured in a CUDA graph"
        return captured, "graph", ""

    def _round(self, turns: Mapping[str, Turn], timer: str, number: int) -> dict[str, float]:
        order = random.Random(number).sample(list(turns), len(turns))  # nobody always follows the same one
        readings = {name: self._take(turns[name], timer) for name in order}
        self._wait()
        return {name: readings[name]() for name in turns}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _take(self, turn: Turn, timer: str) -> Callable[[], float]:
        """Runs it; gives a function that reads the milliseconds, on a GPU once it is done."""
        if timer == "graph":
            return self._backlog.take(turn.setup, turn.action)
        state = turn.setup()
        self._cache.zero_()
        self._wait()  # no launch hides behind what the one before has left to do
        if timer == "host":
            begun = time.perf_counter()
            turn.action(state)
            self._wait()
            took = 1e3 * (time.perf_counter() - begun)
            return lambda: took
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        turn.action(state)
        end.record()
        return lambda: start.elapsed_time(end)


def eager_turn(implementation: Implementation, phase: str) -> Turn:
    """The phase as a user runs it."""

    def prepared() -> None:
        implementation.prepare()

    def forward() -> Sequence[torch.Tensor]:
        implementation.prepare()
        return implementation.forward()

    if phase == "forward":
        return Turn(prepared, lambda _: implementation.forward())
    if phase == "backward":
        return Turn(forward, implementation.backward)
    return Turn(prepared, lambda _: implementation.backward(implementation.forward()))


def captured_turn(implementation: Implementation, phase: str) -> Turn:
    """The phase as a CUDA graph."""
    implementation.prepare()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            implementation.backward(implementation.forward())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    held: list[Any] = []  # a graph writes where these are
    with torch.cuda.graph(graph):
        outputs = implementation.forward()
        if phase == "both":
            held.append(implementation.backward(outputs))
    held.append(outputs)
    if phase != "backward":
        return Turn(lambda: held, lambda _: graph.replay())
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second, pool=graph.pool()):
        held.append(implementation.backward(outputs))

    def first() -> list[Any]:
        graph.replay()
        return held

    return Turn(first, lambda _: second.replay())
