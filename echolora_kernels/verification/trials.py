"""One draw of an operator's arguments, its results by a backend and by plain torch, and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
Compute = Callable[[Tensors], Tensors]

LIMIT = 1.5  # times the error of plain torch


@dataclass(frozen=True)
class Trial:
    """One draw of arguments. Outputs whose names have the first word in common are pooled.

    Args:
        tensors: floating arguments by name, in the dtype that is verified.
        frozen: those of them that get no gradient.
        incoming: the gradients of some outputs, by name.
        kernels, plain: from such tensors, of any dtype, to the outputs by name: by the backend, and by plain torch.
    """

    tensors: Tensors
    frozen: frozenset[str]
    incoming: Tensors
    kernels: Compute
    plain: Compute

    def compare(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Output or "d" and argument -> what the backend, plain torch and float64 make of it."""
        ours, theirs = self._results(self.kernels), self._results(self.plain)
        exact = self._results(self.plain, torch.float64)
        return {name: (ours[name], theirs[name], exact[name]) for name in exact}

    def _results(self, compute: Compute, dtype: torch.dtype | None = None) -> Tensors:
        leaves = {
            name: tensor.to(dtype or tensor.dtype).detach().requires_grad_(name not in self.frozen)
            for name, tensor in self.tensors.items()
        }
        outputs = compute(leaves)
        wanted = [name for name in leaves if name not in self.frozen]
        gradients = torch.autograd.grad(
            [outputs[name] for name in self.incoming],
            [leaves[name] for name in wanted],
            [incoming.to(outputs[name].dtype) for name, incoming in self.incoming.items()],
        )
        found = {name: output.detach() for name, output in outputs.items()}
        return found | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


class Errors:
    """Errors of one result over several draws, each relative to the draw's largest number.

    The largest error of a draw is averaged over the draws, and the squares are pooled: a single draw's largest of a
    few numbers is a matter of luck. Plain torch's errors below half a unit in the last place of the largest number
    count as that: they are the rounding of the result.
    """

    def __init__(self) -> None:
        self._largest, self._squares = [0.0, 0.0], [0.0, 0.0]  # of ours, of plain torch

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
        """One more draw; raises ValueError where dtype or shape are not plain torch's."""
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            got, want = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (ours, theirs))
            raise ValueError(f"got {got}, wants {want}")
        scale = max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)
        floor = torch.finfo(ours.dtype).eps / 2
        for index, result in enumerate((ours, theirs)):
            error = (result.double() - exact) / scale
            least = (0.0, floor)[index]
            self._largest[index] += _at_least(error.abs().max().item(), least)
            self._squares[index] += _at_least(error.square().mean().item(), (least / 4) ** 2)

    def include(self, other: Errors) -> None:
        """The draws of another result, as if they had been this one's."""
        for mine, theirs in ((self._largest, other._largest), (self._squares, other._squares)):
            for index, value in enumerate(theirs):
                mine[index] += value

    def ratios(self) -> tuple[float, float]:
        """Largest and rms error, as multiples of plain torch's; NaN where either is."""
        return self._largest[0] / self._largest[1], math.sqrt(self._squares[0] / self._squares[1])


def _at_least(value: float, least: float) -> float:
    return value if math.isnan(value) else max(value, least)
