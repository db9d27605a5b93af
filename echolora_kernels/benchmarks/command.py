"""The command line of `echolora bench` and `python -m echolora_kernels.benchmarks`: argparse, so that torch is enough."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from ..environment import conditions
from . import display, rates, report
from .cases import CUSTOM, DTYPES, KINDS, METHODS, PHASES, Case, Filters, registry
from .run import Bench, Row, release
from .timing import TIMERS, Timer

_EPILOG = """\
examples:
  echolora bench                                            the quick part
  echolora bench --cases 'smollm2/*' --kind layer --rank 16 --dtype bf16 --dropout 0
  echolora bench --shape 8192x4096x4096+1024+1024 --method lora --rank 16 --output results
  echolora bench --cases '*/layer/q/*' --quick --roofline

Every implementation is compared with float64 before it is timed; exit status 1 where one is wrong, which gets no time.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = _Parser(
        prog="echolora bench",
        description="Time layers, losses, echo networks and training steps beside their peers and the device's floor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = made.add_argument_group("which cases; without any of these the quick part")
    which.add_argument(
        "--cases", nargs="+", default=[], metavar="GLOB", help="patterns of names, such as 'smollm2/layer/*'"
    )
    which.add_argument("--kind", nargs="+", default=[], choices=KINDS)
    which.add_argument("--model", nargs="+", default=[], metavar="NAME", help="smollm2, llama2-7b, llama3-8b or custom")
    which.add_argument(
        "--part", nargs="+", default=[], metavar="NAME", help="q, k, up, down, qkv, gate_up; a task; ..."
    )
    which.add_argument("--method", nargs="+", default=[], choices=METHODS)
    which.add_argument("--rank", nargs="+", default=[], type=int, metavar="R")
    which.add_argument("--dropout", nargs="+", default=[], type=float, metavar="P")
    which.add_argument("--echo", nargs="+", default=[], choices=("on", "off"))
    which.add_argument("--dtype", nargs="+", default=[], type=_dtype, choices=DTYPES)
    which.add_argument("--quick", action="store_true", help="of these, those of the quick part")
    which.add_argument(
        "--shape", nargs="+", default=[], metavar="MxKxN", help="layers of these sizes instead; MxKxN+N+N is a group"
    )
    which.add_argument(
        "--rows", type=int, metavar="M", help="rows of x in the layers (default: 1024 on a CPU, 8192 on a GPU)"
    )
    which.add_argument("--list", action="store_true", help="print the names of the cases and end")
    how = made.add_argument_group("how")
    how.add_argument("--phase", nargs="+", default=["both"], choices=PHASES, help="(default: both)")
    how.add_argument(
        "--implementations",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="patterns of names to time besides the base, such as 'ours*' (default: all)",
    )
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default: auto)")
    how.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    how.add_argument(
        "--timer",
        default="auto",
        choices=TIMERS,
        help="on a GPU: auto is events for steps, graph where all can be captured, else events",
    )
    how.add_argument(
        "--rounds", type=int, help="of each implementation (default: as many as --seconds takes, 5 at least)"
    )
    how.add_argument(
        "--seconds", type=float, default=1.0, help="for all implementations of a case in a phase (default: 1)"
    )
    how.add_argument("--time-limit", type=float, metavar="S", help="begin no further case after so many seconds")
    how.add_argument("--warm", action="store_true", help="leave the caches warm between turns")
    how.add_argument("--no-memory", action="store_true", help="measure no peak memory and count no launches")
    what = made.add_argument_group("what comes out")
    what.add_argument("--roofline", action="store_true", help="show floor and measured side by side, and plot them")
    what.add_argument("--output", type=Path, metavar="DIR", help="write bench.csv, bench.json and plots there")
    return made


def _dtype(name: str) -> str:
    """The registry's name of a dtype, for torch's own too."""
    return next((short for short, dtype in DTYPES.items() if str(dtype) == f"torch.{name}"), name)


def main(arguments: Sequence[str]) -> int:
    """Runs it; gives the exit status.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: a flag cannot be honoured; the message names it.
    """
    options = parser().parse_args(arguments)
    device = device_of(options.device)
    cases = cases_of(options, device)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    for name in ("threads", "rounds", "rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, wants at least 1")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    timer = Timer(device, options.timer, options.warm)
    measured = rates.measure(device, sorted({case.dtype for case in cases}))
    environment = conditions(device) | _rates_and_caches(measured, timer, arguments)
    print("\n".join(f"{name}: {value}" for name, value in environment.items()), flush=True)
    bench = Bench(
        timer,
        measured,
        options.phase,
        options.implementations,
        left_out(options),
        options.rounds,
        options.seconds,
        not options.no_memory,
        None if options.time_limit is None else started + options.time_limit,
        {"device": environment["device"], "torch": environment["torch"], "version": environment["echolora_kernels"]},
    )
    rows: list[Row] = []
    with display.progress(len(cases)) as done:
        for number, case in enumerate(cases):
            done(number, case.name)
            found = bench.run(case)
            release(device)
            display.show(found, options.roofline)
            rows += found
            if options.output is not None:  # after every case: a run that is cut short leaves what it has
                report.write(rows, environment, options.output)
    if options.output is not None:
        _plot(rows, environment, options.output, options.roofline)
    if noise := report.noise_of(rows):
        print(f"\n{noise}")
    wrong = sum(row.status == "wrong" for row in rows)
    took = f"{len(cases)} cases in {time.monotonic() - started:.0f} s"
    print(f"\n{took}" + (f"; {wrong} WRONG, see above" if wrong else ""))
    return 1 if wrong else 0


def left_out(options: argparse.Namespace) -> dict[str, str]:
    """What the quick part does without, unless it is named."""
    if options.implementations or not _filters(options).quick:
        return {}
    return {"peft-compiled": "takes long to compile, so not of the quick part; --implementations names it"}


def cases_of(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that the flags ask for; the quick part where they ask for none."""
    return _filters(options).keep(registry(options.shape, options.rows), device)


def _filters(options: argparse.Namespace) -> Filters:
    filters = Filters(
        options.cases,
        options.kind,
        options.model,
        options.part,
        options.method,
        options.rank,
        options.dropout,
        [choice == "on" for choice in options.echo],
        options.dtype,
        options.quick,
    )
    if options.shape and not options.cases and not options.model:
        return replace(filters, model=[CUSTOM])
    return Filters(quick=True) if filters.empty() and not options.list else filters


def device_of(name: str) -> torch.device:
    """The device of that name, or the GPU where there is one for "auto"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, wants cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch finds no GPU")
    return device


def _rates_and_caches(measured: rates.Rates, timer: Timer, arguments: Sequence[str]) -> dict[str, str]:
    teraflops = ", ".join(f"{value:.3g} TFLOP/s {name}" for name, value in measured.teraflops.items())
    flushed = f"{timer.flushed // 2**20} MiB written before every turn" if timer.flushed else "warm"
    return {
        "copy": f"{measured.gigabytes:.4g} GB/s read and written",
        "products": teraflops,
        "caches": flushed,
        "command": " ".join(("echolora bench", *arguments)),
    }


def _plot(rows: Sequence[Row], environment: dict[str, str], folder: Path, roofline: bool) -> None:
    print()
    for path in report.files(folder):
        print(path)
    try:
        from . import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed")
        return
    for path in plots.write(rows, environment, folder, roofline):
        print(path)
