"""The forward and the backward pass by a backend's kernels, as plain functions of tensors.

A backend's module has `forward(u, down, proj_up, gate_up, gate_bias, scale, widths)`, which returns Delta, module by
module a contiguous [N, width], in one dimension, and H = tanh(u down^T) [N, 2 n m] in the accumulator's dtype; and
`backward(ddelta, h, proj_up, gate_up, gate_bias, scale, widths)`, which returns the gradients of u down^T, proj_up,
gate_up, gate_bias and scale. Their arguments are contiguous. The backward pass's products with u are the vendor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def load(backend: str) -> Any:
    """The module of "triton" or "cpp"; imports what it needs."""
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    from . import compiled

    return compiled


def forward_pass(
    backend: str, tensors: Sequence[torch.Tensor], widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta [N * sum of widths] and H [N, 2 n m]; tensors: u, down, proj_up, gate_up, gate_bias, scale."""
    return load(backend).forward(*(tensor.contiguous() for tensor in tensors), widths)


def backward_pass(
    backend: str,
    ddelta: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    h: torch.Tensor,
    widths: Sequence[int],
    need_u: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of the forward pass's tensors; that of u is empty without need_u."""
    u, down, *up = tensors
    da, *gradients = load(backend).backward(*(tensor.contiguous() for tensor in (ddelta, h, *up)), widths)
    with torch.autocast(u.device.type, enabled=False):
        return (da @ down if need_u else u.new_empty(0)), da.t() @ u, *gradients
