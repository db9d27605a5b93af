"""The two passes by the compiled library; csrc/library.cpp says what its operators compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_BOTTLENECK = None


def forward(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta and H; see `passes`."""
    return torch.ops.echolora.networks_forward.default(u, down, proj_up, gate_up, gate_bias, scale, widths)


def backward(
    ddelta: torch.Tensor,
    h: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of u down^T, proj_up, gate_up, gate_bias and scale; see `passes`."""
    return torch.ops.echolora.networks_backward.default(ddelta, h, proj_up, gate_up, gate_bias, scale, widths)
