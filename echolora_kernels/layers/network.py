"""`EchoNetworks`: the projections and gates of all target modules; they exist only while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..functional import echo_networks


class NetworkParameters(NamedTuple):
    """One module's parameters: W1 [m, d], W2 [width, m], U1 [m, d], U2 [width, m], c [width], lambda (a scalar)."""

    proj_down: torch.Tensor
    proj_up: torch.Tensor
    gate_down: torch.Tensor
    gate_up: torch.Tensor
    gate_bias: torch.Tensor
    scale: torch.Tensor


class EchoNetworks(nn.Module):
    """Turns normalised boundary states into the echo vectors of several modules, all at once.

    ``Delta = lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u))`` for each module; docs/method.md "projection",
    "gate", "echo" (R).

    Initial values: W1, U1 kaiming-uniform (a = sqrt 5); W2 = U2 = 0, c = gate_bias, lambda = scale. The echo is then
    exactly zero and still learns: W2 has a gradient at once, the others once W2 has moved.

    Args:
        width: d, width of the boundary states.
        out_features: width of the site that receives the echo, by the name of each of the n modules.
        bottleneck: m.
        gate_bias: initial c.
        scale: initial lambda.
        device, dtype: of every parameter.

    Attributes:
        down: [2 n m, d], W1 and U1 of the first module, of the second, ...; proj_up: W2 and gate_up: U2, [sum of
            out_features, m]; gate_bias: c, [sum of out_features]; scale: lambda, [n].

    Raises:
        ValueError: a size is not at least 1, or there is no module.
    """

    def __init__(
        self,
        width: int,
        out_features: Mapping[str, int],
        bottleneck: int = 64,
        *,
        gate_bias: float = -2.0,
        scale: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not out_features:
            raise ValueError("out_features: got no module, wants at least one")
        of_modules = ((f"out_features[{name!r}]", size) for name, size in out_features.items())
        for name, size in (("width", width), ("bottleneck", bottleneck), *of_modules):
            if size < 1:
                raise ValueError(f"{name}: got {size}, wants at least 1")
        self.out_features, self.bottleneck = dict(out_features), bottleneck
        count, total = len(out_features), sum(out_features.values())
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(2 * count * bottleneck, width, **kind))
        self.proj_up = nn.Parameter(torch.empty(total, bottleneck, **kind))
        self.gate_up = nn.Parameter(torch.empty(total, bottleneck, **kind))
        self.gate_bias = nn.Parameter(torch.empty(total, **kind))
        self.scale = nn.Parameter(torch.full((count,), scale, **kind))
        for name in out_features:
            # what four nn.Linear of each module would draw, so that seeds mean what they would mean there
            w1, w2, u1, u2, c, _ = self.network(name)
            for matrix in (w1, w2, u1, u2):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            nn.init.uniform_(c)
        nn.init.zeros_(self.proj_up)  # zeroing down as well would zero every gradient for ever
        nn.init.zeros_(self.gate_up)
        nn.init.constant_(self.gate_bias, gate_bias)

    def forward(self, u: torch.Tensor) -> dict[str, torch.Tensor]:
        """Delta, [N, out_features], by the name of each module, for normalised boundary states u [N, width]."""
        widths = list(self.out_features.values())
        deltas = echo_networks(u, self.down, self.proj_up, self.gate_up, self.gate_bias, self.scale, widths)
        return dict(zip(self.out_features, deltas, strict=True))

    def network(self, name: str) -> NetworkParameters:
        """Views of one module's parameters, outside autograd.

        Raises:
            KeyError: there is no module of that name.
        """
        size, m, names = self.out_features[name], self.bottleneck, list(self.out_features)
        index = names.index(name)
        start = sum(self.out_features[other] for other in names[:index])
        w1, u1 = self.down.detach()[2 * index * m : 2 * (index + 1) * m].split(m)
        rows = slice(start, start + size)
        w2, u2, c = (parameter.detach()[rows] for parameter in (self.proj_up, self.gate_up, self.gate_bias))
        return NetworkParameters(w1, w2, u1, u2, c, self.scale.detach()[index])
