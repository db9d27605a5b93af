"""Arguments for the losses, and their results by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from linear_cases import device_for

from echolora_kernels.losses import EchoLosses, echo_distillation_linear, echo_distillation_rows

PARTS = ("loss", "loss_off", "loss_on", "loss_kd")


@dataclass(frozen=True)
class Case:
    """Logits of two branches, or hidden states and a head where there is a weight."""

    off: torch.Tensor
    on: torch.Tensor | None
    targets: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        tensors = {name: getattr(self, name) for name in ("off", "on", "weight", "bias")}
        return replace(self, **{name: None if t is None else t.to(dtype) for name, t in tensors.items()})

    def call(self, backend: str) -> EchoLosses:
        if self.weight is None:
            return echo_distillation_rows(self.off, self.on, self.targets, backend=backend, **self.options)
        head = {"bias": self.bias, "backend": backend}
        return echo_distillation_linear(self.off, self.on, self.weight, self.targets, **head, **self.options)

    def leaves(self) -> Case:
        on = None if self.on is None else self.on.detach().requires_grad_()
        return replace(self, off=self.off.detach().requires_grad_(), on=on)

    def results(self, backend: str, part: str = "loss") -> dict[str, torch.Tensor]:
        """Every part, and the gradients of one."""
        case = self.leaves()
        losses = case.call(backend)
        found = {name: value.detach() for name, value in zip(PARTS, losses, strict=True) if value is not None}
        inputs = {name: t for name, t in (("off", case.off), ("on", case.on)) if t is not None}
        gradients = torch.autograd.grad(getattr(losses, part), list(inputs.values()), allow_unused=True)
        for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
            found[name] = torch.zeros_like(tensor) if gradient is None else gradient
        return found


def rows(backend: str, count=7, vocabulary=37, *, routed=True, dtype=torch.float64, near=1.0, **options) -> Case:
    """Logits of `count` rows, every third without a target; ON differs from OFF by `near`."""
    device = device_for(backend)
    off = 3 * torch.randn(count, vocabulary, dtype=torch.float64)
    on = off + near * torch.randn(count, vocabulary, dtype=torch.float64)
    targets = torch.randint(vocabulary, (count,))
    targets[::3] = -100
    off, on = off.to(device, dtype), on.to(device, dtype)
    return Case(off, on if routed else None, targets.to(device), options=options)


def linear(backend: str, count=7, vocabulary=37, width=5, *, routed=True, bias=False, dtype=torch.float64, **options):
    """The same behind a head."""
    case = rows(backend, count, width, routed=routed, dtype=dtype, **options)
    targets = torch.where(case.targets < 0, case.targets, torch.randint_like(case.targets, vocabulary))
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(case.off)  # noqa: E731
    return replace(case, targets=targets, weight=draw(vocabulary, width) * 0.7, bias=draw(vocabulary) if bias else None)
