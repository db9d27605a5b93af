"""The Triton kernels as one set, `kernels.Kernels`. S and what multiplies it are rounded to x's dtype."""

from __future__ import annotations

import torch

from ..dora_norm.triton_norm import dora_norm
from .configs import MAX_RANK
from .launch import want_runnable
from .triton_backward_launch import adapter_backward, lora_a_backward
from .triton_forward_launch import shrink
from .triton_products import adapter_input_gradient, expand, group_input_product, input_product, linear_product
from .triton_small_launch import small, small_backward, small_forward

__all__ = [
    "adapter_backward",
    "adapter_input_gradient",
    "dora_norm",
    "expand",
    "fused",
    "group_input_product",
    "input_product",
    "linear_product",
    "lora_a_backward",
    "max_rank",
    "s_dtype",
    "shrink",
    "small",
    "small_backward",
    "small_forward",
    "want_runnable",
]

max_rank = MAX_RANK
fused = False


def s_dtype(x_dtype: torch.dtype, lora_dtype: torch.dtype) -> torch.dtype:
    """x's dtype, whatever the adapters are in."""
    return x_dtype
