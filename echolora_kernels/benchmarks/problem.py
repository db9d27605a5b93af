"""A case made concrete: arguments on a device, and the implementations that take them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..verification.trials import LIMIT

Tensors = dict[str, torch.Tensor]
OTHERS_LIMIT = 3.0  # times plain torch's error that is still rounding, for implementations that are not ours


@functools.cache
def why_no(package: str) -> str | None:
    """Why a package cannot be used here, or None; some that are installed cannot be imported without a GPU."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{package} cannot be imported: {told(error)}"
    return None


def told(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def nothing() -> None:
    """What needs no preparation."""


@dataclass(frozen=True)
class Stage:
    """A part of the work that cannot take less than its arithmetic, nor less than its traffic.

    Args:
        name: what it is. flops: of matrix products. size: bytes that have to cross the memory bus.
        base: whether the frozen layer needs it too.
    """

    name: str
    flops: float
    size: float
    base: bool = False


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute a case.

    Args:
        forward: builds the graph and gives the outputs, in the order of `incoming`.
        leaves: name -> what gets a gradient.
        incoming: gradients of the outputs; None for a loss.
        expected: results and gradients of plain torch in the same dtypes, and in float64, by the same names; None
            where there is nothing to be right about. Called just after a forward that was seeded with `check.SEED`.
        checked: what the check runs in place of `forward`.
        limit: at most this multiple of plain torch's error is right.
        computed_in: dtype of the arithmetic, where that of the leaves is wider.
        prepare: brings shared state into the form that this implementation wants; never timed.
        note: what a reader of the numbers has to know.
    """

    forward: Callable[[], Sequence[torch.Tensor]]
    leaves: Mapping[str, torch.Tensor]
    incoming: Sequence[torch.Tensor] | None
    expected: Callable[[], tuple[Tensors, Tensors]] | None
    checked: Callable[[], Sequence[torch.Tensor]] | None = None
    limit: float = LIMIT
    computed_in: torch.dtype | None = None
    prepare: Callable[[], None] = nothing
    note: str = ""

    def backward(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The gradients of all leaves."""
        return torch.autograd.grad(list(outputs), list(self.leaves.values()), self.incoming)


@dataclass(frozen=True, eq=False)
class Problem:
    """What `Case.build` gives.

    Args:
        base: name of the implementation that the others are compared with, if any.
        absent: name -> why an implementation is not here.
        stages: phase -> work that nothing can do without; empty where no floor is known.
    """

    base: str | None
    implementations: dict[str, Implementation]
    absent: dict[str, str] = field(default_factory=dict)
    stages: dict[str, list[Stage]] = field(default_factory=dict)
