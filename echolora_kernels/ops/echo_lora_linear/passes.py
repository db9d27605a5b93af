"""One forward and one backward pass as plain functions of tensors: which kernels run, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..dora_norm.triton_norm import dora_norm
from .echo import Echo
from .launch import Dropout, as_rows
from .products import input_product, linear_product
from .triton_backward_launch import adapter_backward, lora_a_backward
from .triton_forward import shrink

# a tensor, or None where the operator goes without it or no needed gradient reads it
Maybe = Any
# shape and dtype of an argument, or None where the operator goes without it
Kind = Any


@dataclass(frozen=True)
class ForwardResult:
    """What one forward pass leaves behind; y has x's leading dimensions, s is None for an empty batch."""

    y: torch.Tensor
    s: Maybe
    z: Maybe
    norm: Maybe
    gain: Maybe


def forward_pass(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor | None,
    echo: Echo | None,
    scaling: float,
    dropout: Dropout,
    store_z: bool,
) -> ForwardResult:
    """F1 and F2, and D0 for DoRA."""
    if x.shape[:-1].numel() == 0:
        return ForwardResult(x.new_empty((*x.shape[:-1], weight.shape[0])), None, None, None, None)
    rows = as_rows(x)
    norm = gain = None
    if magnitude is not None:
        norm, gain = dora_norm(weight, lora_a, lora_b, scaling, magnitude)
    inner = echo if echo is not None and echo.site != "output" else None
    outer = echo if echo is not None and echo.site == "output" else None
    s = shrink(
        rows,
        lora_a,
        scaling,
        dropout=dropout,
        site="none" if inner is None else inner.site,
        delta=None if inner is None else inner.delta,
        mask=None if inner is None else inner.mask,
    )
    y, z = linear_product(
        rows,
        weight,
        s,
        lora_b,
        bias=bias,
        gain=gain,
        delta=None if outer is None else outer.delta,
        mask=None if outer is None else outer.mask,
        dropout=dropout,
        store_z=store_z,
        shape=(*x.shape[:-1], weight.shape[0]),
    )
    return ForwardResult(y, s, z, norm, gain)


def backward_pass(
    dy: torch.Tensor,
    x: Maybe,
    weight: Maybe,
    lora_a: Maybe,
    lora_b: torch.Tensor,
    delta: Maybe,
    mask: Maybe,
    out: ForwardResult,
    site: str,
    scaling: float,
    dropout: Dropout,
    kinds: Sequence[Kind],
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """B1, B2 and B3, those of them that are needed.

    Args:
        dy: gradient of y, any strides; never written.
        x, weight, lora_a, lora_b, delta, mask: as in the forward pass; None where no needed gradient reads them.
        out: what the forward pass left behind; its y is not read.
        kinds, needs: of x, weight, bias, lora_a, lora_b, magnitude and delta.

    Returns:
        The seven gradients, None where not needed.
    """
    if dy.numel() == 0:
        return [
            dy.new_zeros(kind[0], dtype=kind[1]) if kind and need else None
            for kind, need in zip(kinds, needs, strict=True)
        ]
    need_x, need_weight, need_bias, need_a, need_b, need_magnitude, need_delta = needs
    x_dtype, w_dtype, bias_dtype, a_dtype, b_dtype, magnitude_dtype, delta_dtype = (k and k[1] for k in kinds)
    s, z, norm, gain = out.s, out.z, out.norm, out.gain
    inner_delta = need_delta and site != "output"
    need_ds = need_x or need_a or inner_delta
    dy_rows = as_rows(dy)
    dx = dweight = dbias = da = db = dmagnitude = ddelta = None

    sums = adapter_backward(
        dy_rows,
        s,
        lora_b,
        scaling,
        gain=gain,
        z=z,
        mask=mask if site == "output" else None,
        need_ds=need_ds,
        need_lora_b=need_b,
        need_bias=need_bias,
        need_gain=need_magnitude,
        need_delta=need_delta and site == "output",
    )
    if sums.bias is not None:
        dbias = sums.bias.to(bias_dtype)
    if sums.lora_b is not None:
        db = sums.lora_b.to(b_dtype)
    if sums.gain is not None:
        dmagnitude = (sums.gain / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(magnitude_dtype)
    if sums.delta is not None:
        ddelta = sums.delta.to(delta_dtype)
    ds: Maybe = None if sums.ds is None else sums.ds.to(x_dtype)
    if inner_delta:
        ddelta = inner_sums(sums.ds, mask)
        if site == "adapter_input":
            with torch.autocast(dy.device.type, enabled=False):
                ddelta = ddelta @ lora_a.to(ddelta.dtype)
        ddelta = ddelta.to(delta_dtype)
    if need_a:
        echo_mask = mask if site == "adapter_input" else None
        da = lora_a_backward(as_rows(x), ds, dropout=dropout, delta=delta, mask=echo_mask, dtype=a_dtype)
    if need_x:
        dx = input_product(dy_rows, weight, ds, lora_a, dropout=dropout, gain=gain).view(kinds[0][0])
    if need_weight:
        dweight = _weight_gradient(dy_rows, as_rows(x), gain).to(w_dtype)
    return [dx, dweight, dbias, da, db, dmagnitude, ddelta]


def inner_sums(ds: Maybe, mask: torch.Tensor) -> torch.Tensor:
    """Sums of dS over each sample's answer, [n, r]: the gradient of an echo in rank space."""
    return (mask.to(ds.dtype).unsqueeze(-1) * ds.view(*mask.shape, -1)).sum(1)


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """dW0 of an unfrozen layer by the vendor's matmul: it is no part of adapter training, so no kernel serves it."""
    dz = dy if gain is None else (dy * gain).to(dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        return dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
