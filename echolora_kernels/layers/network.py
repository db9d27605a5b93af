"""`EchoNetwork`: the projection and gate of one target module; exists only while training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..functional import echo_network


class EchoNetwork(nn.Module):
    """Turns normalised boundary states into echo vectors.

    ``Delta = lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u))``; docs/method.md "projection", "gate", "echo" (R).

    Initial values: W1, U1 kaiming-uniform (a = sqrt 5); W2 = U2 = 0, c = gate_bias, lambda = scale. The echo is then
    exactly zero and still learns: W2 has a gradient at once, the others once W2 has moved.

    Args:
        width: d, width of the boundary states.
        out_features: width of the site that receives the echo.
        bottleneck: m.
        gate_bias: initial c.
        scale: initial lambda.
        device, dtype: of every parameter.

    Attributes:
        proj_down: W1 [m, d]. proj_up: W2 [out_features, m]. gate_down: U1 [m, d]. gate_up: U2 [out_features, m] and c.
        scale: lambda, [1].

    Raises:
        ValueError: a size is not at least 1.
    """

    def __init__(
        self,
        width: int,
        out_features: int,
        bottleneck: int = 64,
        *,
        gate_bias: float = -2.0,
        scale: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("out_features", out_features), ("bottleneck", bottleneck)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, wants at least 1")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj_down = nn.Linear(width, bottleneck, bias=False, **kind)
        self.proj_up = nn.Linear(bottleneck, out_features, bias=False, **kind)
        self.gate_down = nn.Linear(width, bottleneck, bias=False, **kind)
        self.gate_up = nn.Linear(bottleneck, out_features, bias=True, **kind)
        self.scale = nn.Parameter(torch.full((1,), scale, **kind))  # FSDP2 cannot shard a scalar
        nn.init.zeros_(self.proj_up.weight)  # zeroing proj_down as well would zero every gradient for ever
        nn.init.zeros_(self.gate_up.weight)
        nn.init.constant_(self.gate_up.bias, gate_bias)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Delta, [N, out_features], for normalised boundary states u [N, width]."""
        return echo_network(
            u,
            self.proj_down.weight,
            self.proj_up.weight,
            self.gate_down.weight,
            self.gate_up.weight,
            self.gate_up.bias,
            self.scale.squeeze(),
        )
