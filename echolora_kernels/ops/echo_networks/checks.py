"""Argument checks of `echo_networks`, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> None:
    """Raise where an argument does not fit the others; the message names it."""
    if not widths or min(widths) < 1:
        raise ValueError(f"widths: got {list(widths)}, wants at least one, each at least 1")
    if u.ndim != 2 or proj_up.ndim != 2:
        shapes = f"{tuple(u.shape)} and {tuple(proj_up.shape)}"
        raise ValueError(f"u, proj_up: got shapes {shapes}, wants [N, d] and [sum of widths, m]")
    total, m = sum(widths), proj_up.shape[1]
    wanted = {
        "down": (down, (2 * len(widths) * m, u.shape[1])),
        "proj_up": (proj_up, (total, m)),
        "gate_up": (gate_up, (total, m)),
        "gate_bias": (gate_bias, (total,)),
        "scale": (scale, (len(widths),)),
    }
    if u.dtype not in DTYPES:
        raise TypeError(f"u: got dtype {u.dtype}, wants one of {', '.join(map(str, DTYPES))}")
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != u.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants {u.dtype} as u")
        if tensor.device != u.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {u.device} as u")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {shape}")
