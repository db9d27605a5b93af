"""The registry: every case that `make bench` and `echolora bench` can time, by name."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import MODELS, TASKS, Model
from .problem import Problem

KINDS = ("layer", "quantised", "loss", "networks", "step")
PHASES = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = ("lora", "dora")
RANKS = (8, 16, 64, 128)
DROPOUTS = (0.0, 0.1)
CUSTOM = "custom"

_ROWS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """One problem that several implementations solve; what does not apply to its kind is None.

    Args:
        name: model/kind/part/..., unique.
        part: which linear, which loss or which task. widths: d_out of each projection.
        rows: rows of x (layers: None for the device's default), of each branch (losses), or samples.
        options: what else the kind wants to know.
    """

    name: str
    kind: str
    model: str
    part: str
    dtype: str
    method: str | None = None
    rank: int | None = None
    dropout: float | None = None
    echo: bool | None = None
    d_in: int | None = None
    widths: tuple[int, ...] = ()
    rows: int | None = None
    options: tuple[str, ...] = ()

    def rows_on(self, device: torch.device) -> int:
        """Rows of x, for layers that leave it to the device."""
        return self.rows or _ROWS.get(device.type, _ROWS["cpu"])

    def build(self, device: torch.device, seed: int = 0) -> Problem:
        """Arguments and implementations on `device`, drawn from `seed`."""
        from . import layers, losses, networks, quantised, steps

        make: dict[str, Callable[[Case, torch.device], Problem]] = {
            "layer": layers.build,
            "quantised": quantised.build,
            "loss": losses.build,
            "networks": networks.build,
            "step": steps.build,
        }
        torch.manual_seed(seed)
        return make[self.kind](self, device)


@dataclass(frozen=True)
class Filters:
    """Which cases are wanted: each filter that is not empty keeps the cases that it names.

    Args:
        cases: shell patterns of names.
        quick: keep `quick_on(device)` alone.
    """

    cases: Sequence[str] = ()
    kind: Sequence[str] = ()
    model: Sequence[str] = ()
    part: Sequence[str] = ()
    method: Sequence[str] = ()
    rank: Sequence[int] = ()
    dropout: Sequence[float] = ()
    echo: Sequence[bool] = ()
    dtype: Sequence[str] = ()
    quick: bool = False

    _ATTRIBUTES = ("kind", "model", "part", "method", "rank", "dropout", "echo", "dtype")

    def empty(self) -> bool:
        """Whether nothing is asked for in particular."""
        return not self.quick and not self.cases and not any(getattr(self, name) for name in self._ATTRIBUTES)

    def keep(self, cases: Iterable[Case], device: torch.device) -> list[Case]:
        """Those of `cases` that are wanted on `device`.

        Raises:
            ValueError: a pattern matches no case, or no case is left.
        """
        cases = list(cases)
        for pattern in self.cases:
            if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
                raise ValueError(
                    f"cases: got {pattern!r}, which matches none of {len(cases)} cases (--list shows them)"
                )
        kept = [case for case in cases if self._wanted(case, device)]
        if not kept:
            raise ValueError("cases: no case is left by these filters (--list shows all)")
        return kept

    def _wanted(self, case: Case, device: torch.device) -> bool:
        if self.quick and not quick_on(case, device):
            return False
        if self.cases and not any(fnmatch.fnmatchcase(case.name, pattern) for pattern in self.cases):
            return False
        wanted = {name: getattr(self, name) for name in self._ATTRIBUTES}
        return all(not values or getattr(case, name) in values for name, values in wanted.items())


def quick_on(case: Case, device: torch.device) -> bool:
    """Whether `case` is of the quick part: a few of each kind, of a size that suits the device."""
    model = "smollm2" if device.type == "cpu" else "llama3-8b"
    if case.model != CUSTOM and case.model != (model if case.kind != "step" else "smollm2"):
        return False
    if case.kind == "layer":
        usual = case.rank == 16 and case.dropout == 0 and not case.echo
        return usual and (case.model == CUSTOM or case.part in ("q", "qkv"))
    if case.kind == "quantised":
        return case.rank == 16 and case.part == "q" and case.dtype == "bf16"
    if case.kind == "loss":
        return case.rows == 64 and case.part == "routed"
    if case.kind == "networks":
        return case.rows == 8
    return case.part == "arc-easy" and case.method == "lora" and case.dtype == "fp32" and not case.options


def registry(shapes: Sequence[str] = (), rows: int | None = None) -> list[Case]:
    """All cases.

    Args:
        shapes: further layers as ROWSxD_INxD_OUT, or ROWSxD_INxD_OUT+D_OUT+... for a group.
        rows: of x in the layers, for every device.

    Raises:
        ValueError: a shape cannot be read.
    """
    found: list[Case] = []
    for model in (model for model in MODELS.values() if model.loss_rows):
        for part, (d_in, widths) in model.parts().items():
            found += _layers(model.name, part, d_in, widths, rows)
            if len(widths) == 1:
                found += _quantised(model.name, part, d_in, widths, rows)
        found += [*_losses(model), *_networks(model), *_steps(model)]
    for text in shapes:
        count, d_in, widths = _read_shape(text)
        found += _layers(CUSTOM, text, d_in, widths, rows or count)
    return found


def _layers(model: str, part: str, d_in: int, widths: tuple[int, ...], rows: int | None) -> Iterator[Case]:
    for method, rank, dropout, echo, dtype in itertools.product(METHODS, RANKS, DROPOUTS, (False, True), DTYPES):
        name = f"{model}/layer/{part}/{method}/r{rank}/p{dropout:g}/{'echo' if echo else 'plain'}/{dtype}"
        yield Case(name, "layer", model, part, dtype, method, rank, dropout, echo, d_in, widths, rows)


def _quantised(model: str, part: str, d_in: int, widths: tuple[int, ...], rows: int | None) -> Iterator[Case]:
    for method, rank, dtype in itertools.product(METHODS, RANKS, DTYPES):
        name = f"{model}/quantised/{part}/{method}/r{rank}/nf4/{dtype}"
        yield Case(name, "quantised", model, part, dtype, method, rank, 0.0, False, d_in, widths, rows)


def _losses(model: Model) -> Iterator[Case]:
    for rows, part, source, dtype in itertools.product(
        model.loss_rows, ("routed", "plain"), ("hidden", "logits"), DTYPES
    ):
        name = f"{model.name}/loss/{part}/{source}/{rows}/{dtype}"
        sizes: dict[str, Any] = {"d_in": model.width, "widths": (model.vocabulary,), "rows": rows}
        yield Case(name, "loss", model.name, part, dtype, options=(source,), **sizes)


def _networks(model: Model) -> Iterator[Case]:
    for samples in (4, 8):
        name = f"{model.name}/networks/targets/{samples}/fp32"
        sizes: dict[str, Any] = {"d_in": model.width, "widths": model.target_widths(), "rows": samples}
        yield Case(name, "networks", model.name, "targets", "fp32", **sizes)


def _steps(model: Model) -> Iterator[Case]:
    for task, method, checkpointing, dtype in itertools.product(TASKS, METHODS, (False, True), DTYPES):
        name = f"{model.name}/step/{task}/{method}/r16/{'checkpointed' if checkpointing else 'kept'}/{dtype}"
        options = ("checkpointed",) if checkpointing else ()
        yield Case(name, "step", model.name, task, dtype, method, 16, 0.0, d_in=model.width, rows=4, options=options)


def _read_shape(text: str) -> tuple[int, int, tuple[int, ...]]:
    try:
        rows, d_in, outputs = text.split("x")
        widths = tuple(map(int, outputs.split("+")))
        sizes = (int(rows), int(d_in), widths)
    except ValueError:
        sizes = (0, 0, (0,))
    if min(sizes[0], sizes[1], *sizes[2]) < 1:
        raise ValueError(f"shape: got {text!r}, wants ROWSxD_INxD_OUT, or ROWSxD_INxD_OUT+D_OUT for a group")
    return sizes
