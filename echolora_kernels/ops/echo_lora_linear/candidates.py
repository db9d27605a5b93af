"""Which way the two large products of `echo_lora_linear` are computed: a table of measurements, else a rule.

"fused"       one Triton kernel computes base product, low-rank term and epilogue
"lora-first"  a Triton kernel writes everything but the base product, the vendor's GEMM adds that to it (beta = 1)
"accumulate"  the vendor's GEMM computes the base product, a Triton kernel adds the rest and applies DoRA's gain

All have the same semantics and save the same tensors. Everything here but `table_for` is a pure function of shapes,
dtype and architecture, the same on every rank; nothing is timed while training.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configs import TILES, rank_block

# product -> the candidates that can compute it for some layer
PRODUCTS = {"forward": ("fused", "lora-first", "accumulate"), "input-gradient": ("fused", "lora-first")}
CANDIDATE_VARIABLE = "ECHOLORA_CANDIDATE"
TABLE_VARIABLE = "ECHOLORA_TUNED"


@dataclass(frozen=True)
class Problem:
    """One product to compute.

    Args:
        product: "forward", x W0^T with output [M, N]; or "input-gradient", dY W0 with output [M, K].
        m, n, k, rank: rows, d_out, d_in, r.
        dtype: "bfloat16", "float16", "float32" or "float64".
        arch: "sm_90", "gfx942", "cpu", ...
        dora: whether a gain multiplies the outputs. dropout: whether DoRA's gain sees a dropped input.
        plain_rows: whether the rows lie one after the other with unit stride, as the vendor's GEMM reads them
            without a copy.
    """

    product: str
    m: int
    n: int
    k: int
    rank: int
    dtype: str
    arch: str
    dora: bool = False
    dropout: bool = False
    plain_rows: bool = True


@dataclass(frozen=True)
class Entry:
    """One measurement: for this product, the fastest candidate, and with which tile.

    Args:
        tile: "KERNEL/NAME" of `configs.TILES`; None leaves it to the rule.
    """

    product: str
    dora: bool
    dtype: str
    m: int
    n: int
    k: int
    rank: int
    candidate: str
    tile: str | None = None


@dataclass(frozen=True)
class Choice:
    """What to run, and why; `tile` as in `Entry`."""

    candidate: str
    reason: str
    tile: str | None = None


def possible(problem: Problem) -> tuple[str, ...]:
    """The candidates that can compute `problem`."""
    if not problem.plain_rows or (problem.dora and problem.dropout):
        return ("fused",)
    if problem.product == "forward" and problem.dora:
        return ("fused", "accumulate")  # the gain comes after the sum, which only a last kernel can apply
    return ("fused", "lora-first")


def choose(problem: Problem, table: tuple[Entry, ...] = (), insist: str | None = None) -> Choice:
    """The candidate for `problem`: the one insisted on, else that of the nearest measurement, else the rule's.

    A measurement speaks for its rank, as kernels pad it, and for up to twice or half its M; the one with the largest M
    speaks for all above it, too.

    Raises:
        ValueError: the candidate insisted on cannot compute this.
    """
    can = possible(problem)
    if insist:
        if insist not in can:
            raise ValueError(f"{CANDIDATE_VARIABLE}: got {insist!r}, wants one of {', '.join(can)} for {problem}")
        return Choice(insist, f"{CANDIDATE_VARIABLE} says so")
    fitting = [entry for entry in table if _fits(entry, problem)]
    most = max((entry.m for entry in fitting), default=0)
    near = [entry for entry in fitting if entry.candidate in can and _doublings(entry, problem, most) <= 1]
    if near:
        nearest = min(near, key=lambda entry: (_doublings(entry, problem, most), entry.m))
        return Choice(nearest.candidate, f"fastest at M = {nearest.m}, r = {nearest.rank} on this device", nearest.tile)
    return Choice(*_rule(problem, can))


def _rule(problem: Problem, can: tuple[str, ...]) -> tuple[str, str]:
    """Without a measurement: the vendor's GEMM, which an untuned kernel rarely beats by what an epilogue saves."""
    if len(can) == 1:
        return can[0], "nothing else can compute this"
    if problem.arch == "cpu":
        return "fused", "Triton's interpreter has no vendor GEMM to prefer"
    if problem.dtype == "float64":
        return can[1], "Triton has no float64 matrix instructions"
    if brief(problem.m, problem.n, problem.k, problem.dtype):
        return "fused", "small: one launch costs less than two"
    return can[1], "no measurement near: the vendor's GEMM is the safe choice"


def brief(m: int, n: int, k: int, dtype: str, launches: int = 1) -> bool:
    """Whether an H100 is done with a product of these sizes before its host has launched so many: some 10 us each."""
    return m * n * k < launches * (2**31 if dtype in ("bfloat16", "float16") else 2**27)


def _fits(entry: Entry, problem: Problem) -> bool:
    same = (entry.product, entry.dora, entry.dtype, entry.n, entry.k) == (
        problem.product, problem.dora, problem.dtype, problem.n, problem.k,
    )  # fmt: skip
    return same and rank_block(entry.rank) == rank_block(problem.rank)


def _doublings(entry: Entry, problem: Problem, most: int) -> float:
    """Between its M and that of `problem`, none of which is far from `most`, the largest one measured, if it is larger."""
    return abs(math.log2(entry.m / max(min(problem.m, most), 1)))


@functools.cache
def table_for(device_name: str, folder: str | None = None) -> tuple[Entry, ...]:
    """The measurements for a device: DEVICE-NAME.json in `folder`, else in the package; empty where there is none.

    Raises:
        ValueError: the file is malformed; the message names it and the entry.
    """
    path = table_path(device_name, folder)
    return tuple(entry for entry, _ in read_table(path)) if path.is_file() else ()


def table_path(device_name: str, folder: str | Path | None = None) -> Path:
    """Where the measurements for a device are: in `folder`, else in the package."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())
    return (Path(folder) if folder else Path(__file__).parent / "tuned") / f"{slug}.json"


def read_table(path: Path) -> list[tuple[Entry, dict[str, Any]]]:
    """Each measurement in a file, and the row that it was read from.

    Raises:
        ValueError: the file is malformed; the message names it and the entry.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return [(_entry(path, number, row), row) for number, row in enumerate(rows)]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wants a JSON object with a list 'entries' ({error})") from error


def _entry(path: Path, number: int, row: dict) -> Entry:
    try:
        entry = Entry(**{name: row[name] for name in Entry.__dataclass_fields__ if name != "tile" or name in row})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: entry {number}: {error} is missing") from error
    known = {f"{kernel}/{name}" for (kernel, _), tiles in TILES.items() for name in tiles}
    if entry.candidate not in PRODUCTS.get(entry.product, ()) or min(entry.m, entry.rank) < 1:
        raise ValueError(f"{path}: entry {number}: got {entry}, wants a known product and candidate, and m, rank >= 1")
    if entry.tile is not None and entry.tile not in known:
        raise ValueError(f"{path}: entry {number}: got tile {entry.tile!r}, wants one of {', '.join(sorted(known))}")
    return entry


def from_environment(product: str) -> tuple[str | None, str | None]:
    """The candidate insisted on for `product` and the folder of tables, where the environment names them.

    Raises:
        ValueError: the variable is malformed, or names a candidate that can never compute its product.
    """
    insisted = parse(os.environ.get(CANDIDATE_VARIABLE, ""))
    return insisted.get(product), os.environ.get(TABLE_VARIABLE) or None


def insisted() -> bool:
    """Whether the environment says how any product is computed."""
    return bool(os.environ.get(CANDIDATE_VARIABLE))


@functools.cache
def parse(text: str) -> dict[str, str]:
    """Product -> candidate, of "fused" (for every product), or of "product=candidate" pairs joined by commas.

    Raises:
        ValueError: it is neither, names a product twice, or a candidate that can never compute its product.
    """
    if text == "fused":
        return dict.fromkeys(PRODUCTS, "fused")
    found: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        product, _, candidate = (part.strip() for part in pair.partition("="))
        if product in found or candidate not in PRODUCTS.get(product, ()):
            choices = "; ".join(f"{name}={'|'.join(ways)}" for name, ways in PRODUCTS.items())
            raise ValueError(
                f"{CANDIDATE_VARIABLE}: got {text!r}, wants 'fused', or one or both of {choices}, joined by a comma"
            )
        found[product] = candidate
    return found
