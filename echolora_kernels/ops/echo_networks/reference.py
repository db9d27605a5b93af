"""Plain PyTorch echo networks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from .checks import check_arguments


def echo_networks(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    """`functional.echo_networks`, which says what the arguments are, one module after the other."""
    check_arguments(u, down, proj_up, gate_up, gate_bias, scale, widths)
    sizes = list(widths)
    kind = u.device.type
    guard = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with guard:
        h = torch.tanh(F.linear(u, down)).unflatten(1, (len(sizes), 2, proj_up.shape[1]))
        parts = zip(h.unbind(1), *(t.split(sizes) for t in (proj_up, gate_up, gate_bias)), scale.unbind(), strict=True)
        return tuple(
            scale_i * torch.sigmoid(F.linear(h_i[:, 1], u2, c)) * F.linear(h_i[:, 0], w2)
            for h_i, w2, u2, c, scale_i in parts
        )
