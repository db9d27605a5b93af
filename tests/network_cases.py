"""Arguments for `echo_networks`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from linear_cases import device_for

from echolora_kernels.functional import echo_networks

NAMES = ("u", "down", "proj_up", "gate_up", "gate_bias", "scale")


@dataclass(frozen=True)
class Case:
    """One set of arguments, and a gradient of each module's Delta."""

    u: torch.Tensor
    down: torch.Tensor
    proj_up: torch.Tensor
    gate_up: torch.Tensor
    gate_bias: torch.Tensor
    scale: torch.Tensor
    widths: tuple[int, ...]
    ddelta: tuple[torch.Tensor, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    def map(self, change) -> Case:
        """`change` done to every tensor."""
        tensors = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **tensors, ddelta=tuple(map(change, self.ddelta)))

    def call(self, backend: str | None) -> tuple[torch.Tensor, ...]:
        return echo_networks(*self.tensors().values(), self.widths, backend=backend)

    def results(self, backend: str, needs=NAMES) -> dict[str, torch.Tensor]:
        """Each Delta and the gradients of `needs`."""
        leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in self.tensors().items()}
        deltas = replace(self, **leaves).call(backend)
        gradients = torch.autograd.grad(deltas, [leaves[name] for name in needs], self.ddelta)
        found = {f"delta {i}": delta.detach() for i, delta in enumerate(deltas)}
        return found | dict(zip(needs, gradients, strict=True))


def make(backend: str, n=3, d=5, m=3, widths=(4, 7), dtype: torch.dtype = torch.float64) -> Case:
    """Random arguments where the backend takes them; sums of about 1."""
    device = device_for(backend)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    total = sum(widths)
    return Case(
        u=draw(n, d),
        down=draw(2 * len(widths) * m, d) / d**0.5,
        proj_up=draw(total, m) / m**0.5,
        gate_up=draw(total, m) / m**0.5,
        gate_bias=draw(total),
        scale=draw(len(widths)),
        widths=tuple(widths),
        ddelta=tuple(draw(n, width) for width in widths),
    )
