"""One forward and one backward pass as plain functions of tensors: which kernels run, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .dropout import Dropout
from .echo import Echo
from .kernels import AdapterGradients, Kernels
from .rows import accumulator_dtype, as_rows

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


def kinds_of(tensors: Sequence[Maybe]) -> list[Kind]:
    """The kind of each."""
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]


def forward_pass(
    kernels: Kernels,
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
    if math.prod(x.shape[:-1]) == 0:
        return ForwardResult(x.new_empty((*x.shape[:-1], weight.shape[0])), None, None, None, None)
    rows = kernels_rows(kernels, x)
    shape = (*x.shape[:-1], weight.shape[0])
    if magnitude is None and echo is None and kernels.small(rows, weight, lora_a.shape[0]):
        s, y = kernels.small_forward(
            rows, weight, lora_a, lora_b, scaling, bias=bias, dropout=dropout, shape=shape
        )  # fmt: skip
        return ForwardResult(y, s, None, None, None)
    norm = gain = None
    if magnitude is not None:
        norm, gain = kernels.dora_norm(weight, lora_a, lora_b, scaling, magnitude)
    if kernels.fused:
        s, y, z = kernels.linear_forward(
            rows,
            weight,
            lora_a,
            lora_b,
            scaling,
            bias=bias,
            gain=gain,
            echo=echo,
            dropout=dropout,
            store_z=store_z,
            shape=shape,
        )
        return ForwardResult(y, s, z, norm, gain)
    inner = echo if echo is not None and echo.site != "output" else None
    outer = echo if echo is not None and echo.site == "output" else None
    s = kernels.shrink(
        rows,
        lora_a,
        scaling,
        dropout=dropout,
        site="none" if inner is None else inner.site,
        delta=None if inner is None else inner.delta,
        mask=None if inner is None else inner.mask,
    )
    y, z = kernels.linear_product(
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
        shape=shape,
    )
    return ForwardResult(y, s, z, norm, gain)


def backward_pass(
    kernels: Kernels,
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
    inner_delta = need_delta and site != "output"
    dy_rows = kernels_rows(kernels, dy)
    rows: Maybe = kernels_rows(kernels, x) if need_a or need_weight else None
    dx: Maybe = None
    da: Maybe = None
    dweight: Maybe = None
    of_output = mask if site == "output" else None
    # S is the same, whichever kernels computed it, and a constant echo that was added to S or to y changes nothing here
    all_three = need_x and need_a and need_b and not (need_weight or need_bias or need_delta)
    if all_three and out.gain is None and delta is None and kernels.small(dy_rows, weight, lora_b.shape[1]):
        dx, da, db = kernels.small_backward(dy_rows, rows, weight, out.s, lora_a, lora_b, scaling, dropout=dropout)
        return [dx.view(kinds[0][0]), None, None, da, db, None, None]
    which = {
        "need_lora_b": need_b,
        "need_bias": need_bias,
        "need_gain": need_magnitude,
        "need_delta": need_delta and not inner_delta,
    }
    if kernels.fused:
        sums, da, dx = kernels.linear_backward(
            dy_rows,
            rows if need_a else None,
            weight if need_x else None,
            out.s,
            lora_a,
            lora_b,
            scaling,
            gain=out.gain,
            z=out.z,
            delta=delta,
            mask=mask,
            dropout=dropout,
            need_ds=inner_delta,
            lora_dtype=kinds[3][1],
            **which,
        )
    else:
        need_ds = need_x or need_a or inner_delta
        sums = kernels.adapter_backward(
            dy_rows, out.s, lora_b, scaling, gain=out.gain, z=out.z, mask=of_output, need_ds=need_ds, **which
        )
        ds: Maybe = sums.ds
        if need_a:
            echo_mask = mask if site == "adapter_input" else None
            da = kernels.lora_a_backward(
                rows, ds, dropout=dropout, delta=delta, mask=echo_mask, dtype=kinds[3][1]
            )  # fmt: skip
        if need_x:
            dx = kernels.input_product(dy_rows, weight, ds, lora_a, dropout=dropout, gain=out.gain)
    dbias, db, dmagnitude, ddelta = from_sums(sums, lora_a, mask, out.norm, site, kinds[2:], inner_delta)
    if need_weight:
        dweight = _weight_gradient(dy_rows, rows, out.gain).to(kinds[1][1])
    if dx is not None and dx.shape != kinds[0][0]:
        dx = dx.view(kinds[0][0])
    return [dx, dweight, dbias, da, db, dmagnitude, ddelta]


def kernels_rows(kernels: Kernels, tensor: torch.Tensor) -> torch.Tensor:
    """[..., width] as [n, T, width]; kernels that are `fused` also take [M, width]."""
    return tensor if kernels.fused and tensor.ndim == 2 else as_rows(tensor)


def from_sums(
    sums: AdapterGradients,
    lora_a: Maybe,
    mask: Maybe,
    norm: Maybe,
    site: str,
    kinds: Sequence[Kind],
    inner_delta: bool,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """The gradients that follow from one pass over dY alone.

    Args:
        sums: that pass's.
        lora_a, mask, site: as in `backward_pass`. norm: DoRA's, [d_out].
        kinds: of bias, lora_a, lora_b, magnitude and delta; lora_a's is not read.
        inner_delta: whether the gradient of an echo inside the adapter is needed.

    Returns:
        The gradients of bias, lora_b, magnitude and delta; None where the sums have none.
    """
    bias_dtype, _, b_dtype, magnitude_dtype, delta_dtype = (kind and kind[1] for kind in kinds)
    dbias = db = dmagnitude = None
    if sums.bias is not None:
        dbias = sums.bias.to(bias_dtype)
    if sums.lora_b is not None:
        db = sums.lora_b.to(b_dtype)
    if sums.gain is not None:
        dmagnitude = (sums.gain / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(magnitude_dtype)
    ddelta = sums.delta
    if inner_delta:
        ddelta = inner_sums(sums.ds, mask)
        if site == "adapter_input":
            with torch.autocast(ddelta.device.type, enabled=False):
                ddelta = ddelta @ lora_a.to(ddelta.dtype)
    return dbias, db, dmagnitude, None if ddelta is None else ddelta.to(delta_dtype)


def inner_sums(ds: Maybe, mask: torch.Tensor) -> torch.Tensor:
    """Sums of dS over each sample's answer, [n, r]: the gradient of an echo in rank space."""
    wide = accumulator_dtype(ds.dtype)
    return (mask.to(wide).unsqueeze(-1) * ds.to(wide).view(*mask.shape, -1)).sum(1)


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """dW0 of an unfrozen layer by the vendor's matmul: it is no part of adapter training, so no kernel serves it."""
    dz = dy if gain is None else (dy * gain).to(dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        return dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
