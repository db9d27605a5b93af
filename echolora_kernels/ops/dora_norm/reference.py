"""Plain PyTorch DoRA norm and gain."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.amp import is_autocast_available


@torch.no_grad()
def dora_norm(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Row norms of the adapted weight, as a constant.

    ``norm[i] = || W0[i] + s (B A)[i] ||_2``, no gradient (DoRA, section 4.3; docs/method.md "DoRA").

    Args:
        weight: [d_out, d_in], floating.
        lora_a: [r, d_in], floating.
        lora_b: [d_out, r], dtype of lora_a.
        scaling: s, dimensionless.

    Returns:
        [d_out], in float32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    device_type = weight.device.type
    guard = torch.autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext()
    with guard:
        adapted = weight.to(dtype) + scaling * (lora_b.to(dtype) @ lora_a.to(dtype))
    return torch.linalg.vector_norm(adapted, dim=1)


def dora_gain(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
) -> torch.Tensor:
    """What DoRA multiplies each output by: ``g = magnitude / sg(norm)``, [d_out], in float32 or wider.

    A row whose norm is zero has nothing to scale; its gain stays finite.
    """
    norm = dora_norm(weight, lora_a, lora_b, scaling)
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
