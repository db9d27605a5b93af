"""One of several adapted linears that share an input: what `echo_lora_linear_group` takes besides x."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .echo import Echo


@dataclass(frozen=True, eq=False)
class Projection:
    """The arguments of `echo_lora_linear` that belong to one projection, under the same names."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    echo: Echo | None = None
