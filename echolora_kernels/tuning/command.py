"""The command line of `echolora tune`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..backends import interpreting
from . import shapes
from .request import Request

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

EXAMPLES = """examples:
  echolora tune --shapes llama3-8b --install
  echolora tune --model ./my-model --rank 16,64 --tokens 4096 --output tables
  echolora tune --dry-run

Only those ways are timed whose results are as exact as plain torch's. The table is written whole after every problem;
what it holds of other problems stays. Exit status: 0 done, 1 a way is wrong or fails, 2 an error, 130 interrupted."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _texts(text)]


def parser() -> argparse.ArgumentParser:
    """Every option with its default."""
    made = _Parser(
        prog="echolora tune",
        description="Time the ways to compute the large products of a model's linears on this machine's GPU, and write "
        "the fastest to the table that the Triton backend reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument("--model", help="a transformers model, by folder or name; only its configuration is read")
    which.add_argument("--shapes", type=_texts, default=["llama3-8b"], help=f"{', '.join(shapes.KNOWN)} (llama3-8b)")
    made.add_argument("--rank", type=_numbers, default=[16, 64], help="comma-separated (16,64)")
    made.add_argument("--dtype", type=_texts, default=["bfloat16"], help="bfloat16, float16, float32 (bfloat16)")
    made.add_argument("--tokens", type=_numbers, default=[512, 2048, 8192], help="rows of x, comma-separated (512,2048,8192)")  # fmt: skip
    made.add_argument("--method", type=_texts, default=["lora", "dora"], help="lora, dora (both)")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="folder of the table; ECHOLORA_TUNED=FOLDER uses it")
    where.add_argument("--install", action="store_true", help="write to the installed package, which uses it by itself")
    made.add_argument("--rounds", type=int, default=20, help="how often each is timed (20)")
    made.add_argument("--minutes", type=float, help="begin no further problem after that")
    made.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that compile (%(default)s)")  # fmt: skip
    made.add_argument("--device", default="cuda", help="cuda or cuda:N (cuda)")
    made.add_argument("--dry-run", action="store_true", help="the same on tiny shapes, on the GPU or in Triton's interpreter; writes to --output alone")  # fmt: skip
    made.add_argument("--json", action="store_true", help="print all measurements as JSON")
    return made


def main(arguments: Sequence[str], progress: Progress | None = None) -> int:
    """Runs the command; gives its exit status.

    Args:
        progress: makes a bar from a text and a number of problems; None prints a line for every problem.

    Raises:
        ValueError: an argument is malformed. RuntimeError: there is no GPU. OSError: the table cannot be written.
    """
    options = parser().parse_args(arguments)
    device = _device(options)
    if not (options.dry_run or options.install or options.output):
        raise ValueError("output: got none, wants --output FOLDER or --install")
    if options.dry_run and options.install:
        raise ValueError("install: got it with --dry-run, whose times mean nothing; wants --output FOLDER or neither")
    # these import triton, which has to know by now whether to interpret
    from ..ops.echo_lora_linear.candidates import table_path
    from .report import Report, versions
    from .run import results
    from .table import merged, read, row, write

    request = _request(options, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = None if options.dry_run and not options.output else table_path(name, options.output)
    report = Report(name, path, len(request.problems()))
    rows = read(path) if path else []
    measured = {"date": datetime.date.today().isoformat(), **versions()}
    try:
        with (progress or _lines)("tuning", report.total) as advance:
            for result in results(request, device):
                report.results.append(result)
                new = row(result, measured)
                if path and new:
                    rows = merged(rows, [new])
                    write(path, name, rows)
                advance(len(report.results))
    except KeyboardInterrupt:
        kept = f"; those are in {path}" if path and report.results else ""
        print(f"interrupted after {len(report.results)} of {report.total} problems{kept}", file=sys.stderr)
        return 130
    print(report.as_json() if options.json else report.text())
    return 0 if report.sound else 1


def _device(options: argparse.Namespace) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device(options.device)
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: got {options.device!r}, wants cuda or cuda:N, N < {torch.cuda.device_count()}")
        torch.cuda.set_device(device.index or 0)
        return torch.device("cuda", torch.cuda.current_device())
    if not options.dry_run:
        raise RuntimeError("there is no GPU to tune for; --dry-run goes the whole way on tiny shapes without one")
    if not interpreting():
        os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _request(options: argparse.Namespace, device: torch.device) -> Request:
    found = [shape for name in options.shapes for shape in shapes.known(name)]
    if options.model:
        found = shapes.of_model(options.model)
    seconds = None if options.minutes is None else 60 * options.minutes
    request = Request(
        shapes.distinct(found), options.rank, options.dtype, options.tokens, options.method, options.rounds,
        options.workers, seconds,
    )  # fmt: skip
    if not options.dry_run:
        return request
    on_cpu: dict[str, Any] = {} if device.type == "cuda" else {"dtypes": ["float32"], "workers": 1}
    small: dict[str, Any] = {"shapes": shapes.tiny(request.shapes), "tokens": [24], "ranks": [4], "rounds": 2}
    return dataclasses.replace(request, **small, **on_cpu)


@contextmanager
def _lines(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A line on standard error now and then."""
    every = max(total // 10, 1)

    def advance(done: int) -> None:
        if done % every == 0 or done == total:
            print(f"{text}: {done}/{total}", file=sys.stderr, flush=True)

    yield advance
