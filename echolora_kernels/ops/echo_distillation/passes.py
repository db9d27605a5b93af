"""The passes from logits that autograd and the registered operators share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..echo_lora_linear.rows import as_rows
from .kernels import load


def forward_pass(
    off: torch.Tensor, on: torch.Tensor | None, targets: torch.Tensor, backend: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [3], and what the backward pass wants to know of each row; see `kernels.Kernels`."""
    return load(backend).forward(as_rows(off), _rows_or_none(on), targets.reshape(-1).contiguous(), temperature)


def backward_pass(
    d_sums: torch.Tensor,
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    stats: torch.Tensor,
    backend: str,
    temperature: float,
    off_learns: bool,
    on_learns: bool,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients of off and on that `needs` asks for, contiguous."""
    results = [off.new_empty(off.shape) if need else None for need in needs]
    load(backend).backward(
        as_rows(off),
        _rows_or_none(on),
        targets.reshape(-1).contiguous(),
        stats,
        temperature,
        d_sums.contiguous(),
        (off_learns, on_learns),
        *map(_rows_or_none, results),
    )
    return [result for result in results if result is not None]


def _rows_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else as_rows(tensor)
