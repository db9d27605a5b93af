"""The operators in plain PyTorch, float64-clean: the specification every backend is measured against."""

from __future__ import annotations

import torch

from .ops.dora_norm.reference import dora_norm
from .ops.echo_distillation.reference import (
    echo_distillation,
    echo_distillation_linear,
    echo_distillation_rows,
)
from .ops.echo_lora_linear import Echo
from .ops.echo_lora_linear.reference import echo_lora_linear as _echo_lora_linear
from .ops.echo_lora_linear.reference import echo_lora_linear_group
from .ops.echo_networks.reference import echo_networks
from .ops.lora_update.reference import lora_update

__all__ = [
    "dora_norm",
    "echo_distillation",
    "echo_distillation_linear",
    "echo_distillation_rows",
    "echo_lora_linear",
    "echo_lora_linear_group",
    "echo_networks",
    "lora_update",
]


def echo_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    magnitude: torch.Tensor | None = None,
    echo: Echo | None = None,
    dora_dropout: str = "exact",
    backend: str | None = None,
) -> torch.Tensor:
    """`functional.echo_lora_linear` by the reference: a drop-in for it, whatever backend would be chosen there.

    Raises:
        ValueError: `backend` names another one.
    """
    if backend not in (None, "reference"):
        raise ValueError(f"backend: got {backend!r}, wants 'reference' or None here")
    return _echo_lora_linear(
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        scaling,
        dropout_p=dropout_p,
        magnitude=magnitude,
        echo=echo,
        dora_dropout=dora_dropout,
    )
