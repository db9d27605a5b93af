"""One forward and one backward pass as plain functions of tensors: which kernels run, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..echo_lora_linear.dropout import Dropout
from ..echo_lora_linear.kernels import Kernels
from ..echo_lora_linear.passes import Kind, Maybe, kernels_rows
from ..echo_lora_linear.rows import accumulator_dtype, as_rows


def forward_pass(
    kernels: Kernels,
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    dropout: Dropout,
    *,
    in_place: bool,
    store_z: bool,
) -> tuple[torch.Tensor, Maybe, Maybe]:
    """y in base's shape, which is `base` itself with `in_place`; S; and what the gain's gradient wants, with `store_z`.

    S and z are None for an empty batch.
    """
    if math.prod(x.shape[:-1]) == 0:
        return base if in_place else torch.empty_like(base), None, None
    gain = _dense(gain, base.dtype)
    s = kernels.shrink(as_rows(x), lora_a, scaling, dropout=dropout)
    rows = base.reshape(-1, base.shape[-1]).contiguous()
    y, z = kernels.expand(s, lora_b, rows, bias=bias, gain=gain, in_place=in_place, store_z=store_z)
    return base if in_place else torch.ops.aten._unsafe_view.default(y, base.shape), s, z


def backward_pass(
    kernels: Kernels,
    dy: torch.Tensor,
    x: Maybe,
    lora_a: Maybe,
    lora_b: torch.Tensor,
    gain: Maybe,
    s: Maybe,
    z: Maybe,
    scaling: float,
    dropout: Dropout,
    kinds: Sequence[Kind],
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients that `needs` asks for.

    Args:
        dy: gradient of y, any strides; never written.
        x, lora_a: as in the forward pass; None where no needed gradient reads them. s, z: what it left behind.
        kinds, needs: of base, x, lora_a, lora_b, gain and bias.

    Returns:
        The six gradients, None where not needed; that of base is dy itself where no gain scales it.
    """
    if dy.numel() == 0:
        return [
            dy.new_zeros(kind[0], dtype=kind[1]) if kind and need else None
            for kind, need in zip(kinds, needs, strict=True)
        ]
    need_base, need_x, need_a, need_b, need_gain, need_bias = needs
    gain = _dense(gain, dy.dtype)
    dy_rows = kernels_rows(kernels, dy)
    rows: Maybe = kernels_rows(kernels, x) if need_a else None
    sums_needed = {
        "need_lora_b": need_b,
        "need_bias": need_bias,
        "need_gain": need_gain,
        "need_delta": False,
    }
    da: Maybe = None
    dx: Maybe = None
    if kernels.fused:
        sums, da, _ = kernels.linear_backward(
            dy_rows, rows, None, s, None, lora_b, scaling, gain=gain, z=z, delta=None, mask=None, dropout=dropout,
            lora_dtype=kinds[2][1], need_ds=need_x, **sums_needed,
        )  # fmt: skip
    else:
        sums = kernels.adapter_backward(
            dy_rows, s, lora_b, scaling, gain=gain, z=z, mask=None, need_ds=need_x or need_a, **sums_needed
        )
        if need_a:
            ds: Maybe = sums.ds
            da = kernels.lora_a_backward(rows, ds, dropout=dropout, dtype=kinds[2][1])
    if need_x:
        ds = sums.ds
        dx = kernels.adapter_input_gradient(ds, lora_a, dropout=dropout, dtype=dy.dtype).view(kinds[1][0])
    dbase: Maybe = None
    if need_base:
        dbase = dy if gain is None else _scaled(dy, gain)
    rest = [
        sum_ if sum_ is None else sum_.to(kind[1])
        for sum_, kind in zip((sums.lora_b, sums.gain, sums.bias), kinds[3:], strict=True)
    ]
    return [dbase, dx, da, *rest]


def _scaled(dy: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """gain * dy in dy's dtype; of a narrow dy with one temporary."""
    return dy * gain if dy.dtype == gain.dtype else dy.to(gain.dtype).mul_(gain).to(dy.dtype)


def _dense(gain: Maybe, dtype: torch.dtype) -> Maybe:
    """The gain as kernels take it: contiguous, in the accumulator's dtype."""
    return None if gain is None else gain.to(accumulator_dtype(dtype)).contiguous()
