"""The C++ kernels as one set, `kernels.Kernels`; csrc/library.cpp says what each operator computes."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import BackendUnavailable


def want_runnable(x: torch.Tensor, name: str) -> None:
    """Raise BackendUnavailable where no kernel can compute with `x`, the argument `name`."""
    if x.device.type != "cpu":
        raise BackendUnavailable(f"{name}: got device {x.device}, wants a cpu tensor for the cpp backend")


def forward(
    off: torch.Tensor, on: torch.Tensor | None, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Kernels`."""
    return _operators().distillation.default(off, on, targets, temperature, None, False, False, None, None)


def backward(
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    scales: torch.Tensor,
    learns: tuple[bool, bool],
    d_off: torch.Tensor | None,
    d_on: torch.Tensor | None,
) -> None:
    """See `Kernels`."""
    _operators().distillation_backward.default(off, on, targets, stats, temperature, scales, *learns, d_off, d_on)


def forward_and_overwrite(
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    scales: torch.Tensor,
    learns: tuple[bool, bool],
    needs: tuple[bool, bool],
) -> torch.Tensor:
    """In one pass over the rows, each while it is in the cache; see `Kernels`."""
    results = (off if needs[0] else None, on if needs[1] else None)
    return _operators().distillation.default(off, on, targets, temperature, scales, *learns, *results)[0]


def _operators() -> Any:
    return torch.ops.echolora
