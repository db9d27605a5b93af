"""Goes through the problems: every way is compared with float64, then timed, and the pick goes into the table."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ..ops.echo_lora_linear.candidates import Problem
from ..ops.echo_lora_linear.configs import Device
from ..ops.echo_lora_linear.launch import device_of
from .request import Request
from .select import Measured, Result
from .timing import interleaved
from .ways import Product, Way, by_rule, is_right, ways


def results(request: Request, device: torch.device) -> Iterator[Result]:
    """One for each problem, as they are done.

    Raises:
        RuntimeError: the GPU can no longer be used after one of the ways, which the message names.
    """
    of = device_of(torch.empty(0, device=device))
    begun = time.perf_counter()
    for problem in request.problems(of.arch):
        if request.seconds is not None and time.perf_counter() - begun > request.seconds:
            return
        yield measure(problem, device, of, request.rounds, request.workers)


def measure(problem: Problem, device: torch.device, of: Device, rounds: int, workers: int) -> Result:
    """Compiles all ways, compares each with float64, and times those that are right in turn."""
    rule, listed = by_rule(problem, of), ways(problem, of)
    try:
        product = Product(problem, device)
    except torch.cuda.OutOfMemoryError as error:
        return Result(problem, rule, [Measured(way, problem=_said(error)) for way in listed])
    problems: dict[Way, str] = {}
    errors: dict[Way, float] = {}

    def attempt(way: Way, action: Callable[[Way], object]) -> None:
        try:
            action(way)
        except Exception as error:  # whatever a broken kernel does: the other ways are still worth knowing
            problems[way] = _said(error)

    def check(way: Way) -> None:
        errors[way] = product.error(way)

    with ThreadPoolExecutor(workers, initializer=begin_thread, initargs=(device,)) as threads:
        # which compiles them side by side
        list(threads.map(lambda way: attempt(way, product.run), listed))
    for way in listed:
        _wait(device, way, problem)
        if way not in problems:
            attempt(way, check)
            _wait(device, way, problem)
    for way, ratio in errors.items():
        if not is_right(ratio):
            problems[way] = f"WRONG: {ratio:.2f} times plain torch's error"
    right = {way: functools.partial(product.run, way) for way in listed if way not in problems}
    times = interleaved(right, device, rounds) if right else {}
    found = [Measured(way, errors.get(way), times.get(way, []), problems.get(way)) for way in listed]
    return Result(problem, rule, found)


def begin_thread(device: torch.device) -> None:
    """Make the device's context that of this thread, which building a tensor descriptor does not."""
    torch.zeros(1, device=device)


def _wait(device: torch.device, way: Way, problem: Problem) -> None:
    """Raise where an earlier launch has made the device unusable."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise RuntimeError(f"the GPU is lost after or before {way} of {problem}: {_said(error)}") from error


def _said(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:300]
