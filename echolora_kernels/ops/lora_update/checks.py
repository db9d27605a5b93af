"""Argument checks of `lora_update`, shared by every backend."""

from __future__ import annotations

import torch


def check_arguments(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless everything fits together."""
    if x.ndim < 1 or base.shape[:-1] != x.shape[:-1] or base.ndim != x.ndim:
        raise ValueError(f"base: got shape {tuple(base.shape)}, wants the leading dimensions of x, {tuple(x.shape)}")
    if lora_a.ndim != 2 or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, wants [r, d_in] with r at least 1")
    d_in, d_out, rank = x.shape[-1], base.shape[-1], lora_a.shape[0]
    wanted = {
        "lora_a": (lora_a, (rank, d_in)),
        "lora_b": (lora_b, (d_out, rank)),
        "gain": (gain, (d_out,)),
        "bias": (bias, (d_out,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {shape}")
    for name, tensor in {"base": base, "x": x, **{name: tensor for name, (tensor, _) in wanted.items()}}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants a floating dtype")
        if tensor.device != base.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {base.device} as base")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: got dtype {lora_b.dtype}, wants {lora_a.dtype} as lora_a")
    if x.dtype != base.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x: got dtype {x.dtype}, wants {base.dtype} as base (or autocast)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, wants 0 <= dropout_p < 1")
