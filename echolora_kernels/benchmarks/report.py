"""Results as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from .run import Row

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


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, under the names of `Row`'s fields; what is not known is empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in rows)


def write_json(rows: Sequence[Row], facts: dict, path: Path) -> None:
    """The environment and all rows."""
    content = {"environment": facts, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


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


def title_of(row: Row) -> str:
    """A case in one line."""
    sizes = f"{row.rows} samples" if row.kind in ("step", "networks") else f"{row.rows} x {row.d_in} -> {row.d_out}"
    return f"{row.case}  ({sizes})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
