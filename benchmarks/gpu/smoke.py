"""One launch of every kernel against float64, with the traceback of whatever fails: torch and Triton are enough.

    python benchmarks/gpu/smoke.py all
    python benchmarks/gpu/smoke.py ways --dtype bfloat16

`checks` is the quick part of `echolora verify`; `ways` goes through every way to compute the large products, with every
tile; `all` is both in every dtype, in processes side by side. The last line of each says how many passed and failed; exit
status 1 where any failed.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

WIDE_LIMIT = 100.0  # float64 has nothing finer: this many halves of its last place


def checks(backend: str, dtype: str) -> Iterator[tuple[str, str | None]]:
    """Name of each check, and what is wrong with it."""
    from echolora_kernels.verification.run import plan
    from echolora_kernels.verification.trials import LIMIT

    jobs, not_run = plan([backend], [dtype], quick=True)
    for row in not_run:
        print(f"not run: {row.operator} {row.dtype}: {row.not_run}", flush=True)
    for job in jobs:
        row, problem = job.run(), None
        if row.problem:
            problem = row.problem
            try:
                torch.manual_seed(0)
                job.check.make(backend, job.device, getattr(torch, dtype)).compare()
            except Exception:
                traceback.print_exc()
        elif not row.passed:
            problem = ", ".join(f"{name} {ratio:.2f}" for name, ratio in map(row.worst, (0, 1)) if not ratio <= LIMIT)
        yield f"{row.operator} {row.options} {row.shape}", problem


def ways(dtype: str) -> Iterator[tuple[str, str | None]]:
    """Every candidate with every tile, on sizes with ragged last tiles."""
    from echolora_kernels.ops.echo_lora_linear.candidates import Problem
    from echolora_kernels.ops.echo_lora_linear.launch import device_of
    from echolora_kernels.tuning.run import begin_thread
    from echolora_kernels.tuning.ways import Product, is_right
    from echolora_kernels.tuning.ways import ways as all_ways

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of = device_of(torch.empty(0, device=device))
    m, n, k = (520, 776, 1000) if device.type == "cuda" else (24, 40, 32)
    ranks = (16, 64, 128) if device.type == "cuda" else (4,)
    for rank, dora, product in itertools.product(ranks, (False, True), ("forward", "input-gradient")):
        problem = Problem(product, m, n, k, rank, dtype, of.arch, dora)
        arguments, listed = Product(problem, device), all_ways(problem, of)
        count = 4 if device.type == "cuda" else 1
        with ThreadPoolExecutor(count, initializer=begin_thread, initargs=(device,)) as threads:
            # they compile, what fails does so again
            for future in [threads.submit(arguments.run, way) for way in listed]:
                future.exception()
        for way in listed:
            name, wrong = f"{product} {'dora' if dora else 'lora'} r {rank}: {way}", None
            try:
                error = arguments.error(way)
                right = error <= WIDE_LIMIT if dtype == "float64" else is_right(error)
                wrong = None if right else f"{error:.2f} times plain torch's error"
            except Exception as raised:
                traceback.print_exc()
                wrong = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
            yield name, wrong


def together(options: argparse.Namespace) -> int:
    """A process for each dtype and each of `checks` and `ways`, all at once: compiling takes the time."""
    kinds = [kind for kind in ("ways", "checks") if kind not in options.skip]
    if options.backend != "triton":
        kinds = ["checks"]
    # float64 has nothing finer to be compared with, but for what each way makes of it
    wanted = [(kind, dtype) for kind in kinds for dtype in options.dtype if (kind, dtype) != ("checks", "float64")]
    command = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for kind, dtype in wanted:
            log = Path(folder) / f"{kind}-{dtype}.log"
            with log.open("w") as output:
                each = [*command, kind, "--backend", options.backend, "--dtype", dtype]
                started[log] = subprocess.Popen(each, stdout=output, stderr=subprocess.STDOUT)
        try:
            return max(process.wait() != 0 for process in started.values())
        finally:  # also where one hangs, and all of them are stopped
            for log, process in started.items():
                print(f"--- {log.stem}, exit status {process.poll()}\n{log.read_text().rstrip()}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "checks", "ways"])
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--skip", nargs="+", default=[], help="checks or ways: leave them out of all")
    options = parser.parse_args()
    if options.what == "all":
        return together(options)
    counts = [0, 0]
    for dtype in options.dtype:
        for name, problem in ways(dtype) if options.what == "ways" else checks(options.backend, dtype):
            counts[problem is not None] += 1
            print(f"{'FAILED' if problem else 'ok'}  {dtype} {name}" + (f": {problem}" if problem else ""), flush=True)
    print(f"{options.what} by {options.backend}, {', '.join(options.dtype)}: {counts[0]} passed, {counts[1]} failed")
    return 1 if counts[1] or not counts[0] else 0


if __name__ == "__main__":
    sys.exit(main())
