"""Plain PyTorch `lora_update`: the specification every kernel is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_arguments


def lora_update(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    overwrite_base: bool = False,
) -> torch.Tensor:
    """`functional.lora_update`, which says what the arguments are, in plain PyTorch; `base` is never written."""
    check_arguments(base, x, lora_a, lora_b, gain, bias, dropout_p)
    dropped = F.dropout(x.to(lora_a.dtype), dropout_p)
    y = base + F.linear(F.linear(dropped, lora_a), lora_b) * scaling
    if gain is not None:
        y = gain * y
    if bias is not None:
        y = y + bias
    return y.to(base.dtype)
