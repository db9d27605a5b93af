"""Plain PyTorch echo network."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def echo_network(
    u: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_down: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The echo vectors of one module.

    ``Delta = lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u))`` (docs/method.md "projection", "gate", "echo"; R)

    Args:
        u: [N, d], normalised boundary states.
        proj_down, gate_down: W1, U1, [m, d].
        proj_up, gate_up: W2, U2, [width, m].
        gate_bias: c, [width].
        scale: lambda, a scalar.

    Returns:
        Delta, [N, width].
    """
    _check_shapes(u, proj_down, proj_up, gate_down, gate_up, gate_bias, scale)
    projection = F.linear(torch.tanh(F.linear(u, proj_down)), proj_up)
    gate = torch.sigmoid(F.linear(torch.tanh(F.linear(u, gate_down)), gate_up, gate_bias))
    return scale * gate * projection


def _check_shapes(
    u: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_down: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    if u.ndim != 2 or proj_down.ndim != 2 or proj_up.ndim != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (u, proj_down, proj_up))
        raise ValueError(f"u, proj_down, proj_up: got shapes {shapes}, wants [N, d], [m, d], [width, m]")
    (m, d), width = proj_down.shape, proj_up.shape[0]
    wanted = {
        "u": (u, (u.shape[0], d)),
        "proj_up": (proj_up, (width, m)),
        "gate_down": (gate_down, (m, d)),
        "gate_up": (gate_up, (width, m)),
        "gate_bias": (gate_bias, (width,)),
        "scale": (scale, ()),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != proj_down.dtype and not torch.is_autocast_enabled(u.device.type):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants {proj_down.dtype} as proj_down (or autocast)")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {shape}")
