"""The file of picks that `candidates.table_for` reads: what is there is added to, and a whole file replaces it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_text
from ..ops.echo_lora_linear.candidates import Entry, read_table
from .select import Result

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file.

    Raises:
        ValueError: the file is malformed.
    """
    return [row for _, row in read_table(path)] if path.exists() else []


def row(result: Result, measured: dict[str, str]) -> Row | None:
    """The pick, with the median and the quartiles of every way beside it; None where no way is right.

    Args:
        measured: when and with what.
    """
    entry = result.entry()
    if entry is None:
        return None
    times = {
        str(each.way): [round(value, 2) for value in (each.median, *each.quartiles)]
        for each in result.measured
        if each.microseconds
    }
    return {**dataclasses.asdict(entry), "microseconds": times, "measured": measured}


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, sorted; of the same product, options, dtype and sizes the new one."""
    fields = [field for field in Entry.__dataclass_fields__ if field not in ("candidate", "tile")]
    by_problem = {tuple(row[field] for field in fields): row for rows in (old, new) for row in rows}
    return [by_problem[key] for key in sorted(by_problem)]


def write(path: Path, device_name: str, rows: list[Row]) -> None:
    """Writes the file beside and renames it into place: whatever happens, `path` is as it was or complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    lines = ",\n".join(f"  {json.dumps(each)}" for each in rows)
    write_text(path, f'{{"device": {json.dumps(device_name)}, "entries": [\n{lines}\n]}}\n')
