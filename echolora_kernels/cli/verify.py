"""`echolora verify`, and what `echolora doctor` shares with it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from .. import __version__
from ..verification.run import DTYPES, Job, Row, plan
from ..verification.trials import LIMIT
from .show import interruptible, progress

_STANDARD_OUTPUT = Path("-")


def verify(
    backend: Annotated[list[str] | None, Option(help="triton, cuda or cpp; may be given several times. By default all that can run here.")] = None,
    dtype: Annotated[list[str] | None, Option(help=f"{', '.join(DTYPES)}; may be given several times. By default all.")] = None,
    quick: Annotated[bool, Option("--quick", help="Only the part that echolora doctor runs.")] = False,
    json_file: Annotated[Path | None, Option("--json", help="Write every ratio of every result there; - prints it in place of the table.")] = None,
) -> None:  # fmt: skip
    """Compare every operator with plain torch on this machine: outputs and all gradients.

    Errors, largest and rms, both against float64, are shown as multiples of plain torch's in the same dtype.
    Several random draws are pooled. Exit status 1 where one is more than 1.5.
    """
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise FileNotFoundError(f"json: got {json_file}, wants a file in a folder that exists")
    jobs, not_run = plan(backend, dtype or DTYPES, quick)
    with interruptible():
        rows = run(jobs)
    ratios = json.dumps(as_json(rows, not_run), indent=2)
    if json_file == _STANDARD_OUTPUT:
        typer.echo(ratios)
    else:
        if json_file is not None:
            json_file.write_text(ratios + "\n")
        show(rows, not_run)
        typer.echo(summary(rows))
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


def run(jobs: Sequence[Job]) -> list[Row]:
    """Does them all under a bar."""
    with progress("verifying", len(jobs)) as done:
        rows = []
        for number, job in enumerate(jobs, 1):
            rows.append(job.run())
            done(number)
    return rows


def summary(rows: Sequence[Row]) -> str:
    """In one line how it went."""
    failed = sum(not row.passed for row in rows)
    if not rows:
        return "nothing to verify: plain torch alone can run here (echolora doctor says why)"
    counted = f"{len(rows)} checks passed" if not failed else f"{failed} of {len(rows)} checks FAILED"
    ratios = [ratio for row in rows for pair in row.ratios.values() for ratio in pair]
    largest = f"{max(ratios, key=lambda ratio: (math.isnan(ratio), ratio)):.2f}" if ratios else "none"
    return f"{counted}; largest error as a multiple of plain torch's: {largest}, at most {LIMIT} is right"


def show(rows: Sequence[Row], not_run: Sequence[Row]) -> None:
    """A table on standard output; what is wrong is red."""
    table = Table(
        "operator", "backend", "dtype", "options", "arguments", "largest error", "rms error", title_justify="left"
    )
    for row in rows:
        cells = [_cell(*row.worst(which)) for which in (0, 1)] if row.ratios else [row.problem or "", ""]
        style = None if row.passed else "bold red"
        table.add_row(row.operator, _where(row), row.dtype, row.options, row.shape, *cells, style=style)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log file has no width
    if rows:
        console.print(table)
    for line in left_out(not_run):
        console.print(line, highlight=False, soft_wrap=True)


def lines(rows: Sequence[Row]) -> list[str]:
    """What failed, as plain text."""
    return [
        f"{row.operator}, {_where(row)}, {row.dtype}, {row.options}: "
        + (
            row.problem
            or ", ".join(f"{kind} {_cell(*row.worst(which))}" for which, kind in enumerate(("largest", "rms")))
        )
        for row in rows
        if not row.passed
    ]


def left_out(not_run: Sequence[Row]) -> list[str]:
    """What was not run and why, as plain text."""
    return [f"not run: {row.operator}, {_where(row)}, {row.dtype}: {row.not_run}" for row in not_run]


def as_json(rows: Sequence[Row], not_run: Sequence[Row]) -> dict[str, Any]:
    """Everything, for a program to read; a ratio that is not a number is null."""
    return {
        "versions": {"echolora_kernels": __version__, "torch": torch.__version__},
        "limit": LIMIT,
        "passed": all(row.passed for row in rows),
        "rows": [
            {
                **dataclasses.asdict(row),
                "passed": row.passed,
                "ratios": {
                    name: {"largest": _number(pair[0]), "rms": _number(pair[1])} for name, pair in row.ratios.items()
                },
            }
            for row in (*rows, *not_run)
        ],
    }


def _where(row: Row) -> str:
    return row.backend if row.device == "cpu" else f"{row.backend} on {row.device}"


def _cell(name: str, ratio: float) -> str:
    return f"{ratio:.2f} ({name})"


def _number(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None
