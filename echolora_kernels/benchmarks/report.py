"""Results as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from .run import Row

_WIDE = 0.2  # of the median

COLUMNS = [each.name for each in dataclasses.fields(Row)]

_HEADINGS = (
    "phase",
    "implementation",
    "ms",
    "iqr",
    "over base",
    "adds ms",
    "over floor",
    "peak MB",
    "launches",
    "error",
)


def files(folder: Path) -> tuple[Path, Path]:
    """Where `write` writes."""
    return folder / "bench.csv", folder / "bench.json"


def write(rows: Sequence[Row], environment: dict[str, str], folder: Path) -> None:
    """CSV, a line a row under the names of `Row`'s fields, what is not known being empty; and the same as JSON.

    Earlier results in `folder` are replaced once the new ones are whole.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    content = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows]}
    for path, text in zip(files(folder), (table.getvalue(), json.dumps(content, indent=1) + "\n"), strict=True):
        write_text(path, text)


def lines_of(rows: Sequence[Row], roofline: bool = False) -> list[list[str]]:
    """The cells of a case's table, a row of headings first; with `roofline`, floor and measured side by side."""
    if roofline:
        found = [["phase", "implementation", "floor ms", "ms", "over floor"]]
        timed = [row for row in rows if row.milliseconds is not None]
        found += [
            [row.phase, row.implementation, _number(row.floor), _number(row.milliseconds), _number(row.over_floor)]
            for row in timed
        ]
        return found
    found = [list(_HEADINGS)]
    for row in rows:
        if row.status != "ok":
            continue
        peak = "" if row.peak_mb is None else f"{row.peak_mb:.1f}"
        cells = map(_number, (row.milliseconds, row.iqr, row.over_base, row.added, row.over_floor))
        launches = "" if row.launches is None else str(row.launches)
        found.append([row.phase, row.implementation, *cells, peak, launches, _number(row.error)])
    return found


def remarks_of(rows: Sequence[Row]) -> list[str]:
    """What is wrong or was not run, and notes, each with the implementations that it is true of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.why:
            found.setdefault(row.why if row.status == "ok" else f"{row.status}: {row.why}", []).append(
                row.implementation
            )
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in found.items()]


def noise_of(rows: Sequence[Row]) -> str | None:
    """A warning where times are spread so widely that they should not be relied on."""
    timed = [row for row in rows if row.milliseconds is not None]
    wide = sum((row.iqr or 0) > _WIDE * (row.milliseconds or 0) for row in timed)
    if not wide:
        return None
    return (
        f"{wide} of {len(timed)} times have quartiles further apart than a fifth of the median: "
        "something else was running, or there were too few rounds"
    )


def title_of(row: Row) -> str:
    """A case in one line."""
    sizes = f"{row.rows} samples" if row.kind in ("step", "networks") else f"{row.rows} x {row.d_in} -> {row.d_out}"
    return f"{row.case}  ({sizes})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
