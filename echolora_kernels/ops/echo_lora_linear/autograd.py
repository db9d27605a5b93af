"""Triton `echo_lora_linear`: what is saved, which gradients are computed, and the public function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..dora_norm.triton_norm import dora_norm
from .checks import check_arguments
from .configs import MAX_RANK
from .echo import Echo
from .launch import Dropout, as_rows, want_runnable
from .products import input_product, linear_product
from .projection import Projection
from .triton_backward_launch import adapter_backward, lora_a_backward
from .triton_forward import shrink

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Forward:
    """What one forward pass leaves behind; y has x's leading dimensions."""

    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor | None
    norm: torch.Tensor | None
    gain: torch.Tensor | None


def _forward(
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
) -> _Forward:
    if x.shape[:-1].numel() == 0:
        nothing = x.new_empty((*x.shape[:-1], weight.shape[0]))
        return _Forward(nothing, nothing, None, None, None)
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
    return _Forward(y, s, z, norm, gain)


class EchoLoRALinearFunction(torch.autograd.Function):
    """Saves x itself, S [rows, r], the seed and vectors of width d_out; never a mask, a dropped x or a cast of x.

    DoRA with a trainable magnitude also saves z, the tensor that the gain multiplies: recovering it from y would
    divide by a gain that may be zero, and would forbid the caller to overwrite y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor | None,
        delta: torch.Tensor | None,
        mask: torch.Tensor | None,
        site: str,
        scaling: float,
        dropout: Dropout,
    ) -> torch.Tensor:
        need_x, need_weight, _, need_a, need_b, need_magnitude, need_delta = ctx.needs_input_grad[:7]
        echo = None if delta is None or mask is None else Echo(delta, mask, site)
        out = _forward(x, weight, bias, lora_a, lora_b, magnitude, echo, scaling, dropout, need_magnitude)
        need_ds = need_x or need_a or (need_delta and site != "output")
        ctx.site, ctx.scaling, ctx.dropout = site, scaling, (dropout.p, dropout.dora)
        inputs = (x, weight, bias, lora_a, lora_b, magnitude, delta)
        ctx.kinds = [None if t is None else (t.shape, t.dtype) for t in inputs]
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            lora_a if need_x or (need_delta and site == "adapter_input") else None,
            lora_b,
            delta if need_a and site == "adapter_input" else None,
            mask if need_delta or site == "adapter_input" else None,
            out.s if need_b or need_ds else None,
            out.z,
            out.norm,
            out.gain,
            dropout.seed,
        )
        return out.y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weight, need_bias, need_a, need_b, need_magnitude, need_delta = ctx.needs_input_grad[:7]
        x, weight, lora_a, lora_b, delta, mask, s, z, norm, gain, seed = ctx.saved_tensors
        if dy.numel() == 0:
            zeros = [dy.new_zeros(kind[0], dtype=kind[1]) if kind else None for kind in ctx.kinds]
            return *(zero if need else None for zero, need in zip(zeros, ctx.needs_input_grad, strict=False)), *[
                None
            ] * 4
        dtypes = [None if kind is None else kind[1] for kind in ctx.kinds]
        x_dtype, w_dtype, bias_dtype, a_dtype, b_dtype, magnitude_dtype, delta_dtype = dtypes
        dropout = Dropout(ctx.dropout[0], seed, ctx.dropout[1])
        inner_delta = need_delta and ctx.site != "output"
        need_ds = need_x or need_a or inner_delta
        dy_rows = as_rows(dy)
        dx = dweight = dbias = da = db = dmagnitude = ddelta = None

        sums = adapter_backward(
            dy_rows,
            s,
            lora_b,
            ctx.scaling,
            gain=gain,
            z=z,
            mask=mask if ctx.site == "output" else None,
            need_ds=need_ds,
            need_lora_b=need_b,
            need_bias=need_bias,
            need_gain=need_magnitude,
            need_delta=need_delta and ctx.site == "output",
        )
        if sums.bias is not None:
            dbias = sums.bias.to(bias_dtype)
        if sums.lora_b is not None:
            db = sums.lora_b.to(b_dtype)
        if sums.gain is not None:
            dmagnitude = (sums.gain / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(magnitude_dtype)
        if sums.delta is not None:
            ddelta = sums.delta.to(delta_dtype)
        ds = None if sums.ds is None else sums.ds.to(x_dtype)
        if inner_delta:
            ddelta = inner_sums(sums.ds, mask)
            if ctx.site == "adapter_input":
                ddelta = ddelta @ lora_a.to(ddelta.dtype)
            ddelta = ddelta.to(delta_dtype)
        if need_a:
            echo_mask = mask if ctx.site == "adapter_input" else None
            da = lora_a_backward(as_rows(x), ds, dropout=dropout, delta=delta, mask=echo_mask, dtype=a_dtype)
        if need_x:
            dx = input_product(dy_rows, weight, ds, lora_a, dropout=dropout, gain=gain).view(ctx.kinds[0][0])
        if need_weight:
            dweight = _weight_gradient(dy_rows, as_rows(x), gain).to(w_dtype)
        return dx, dweight, dbias, da, db, dmagnitude, ddelta, None, None, None, None


def inner_sums(ds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums of dS over each sample's answer, [n, r]: the gradient of an echo in rank space."""
    return (mask.to(ds.dtype).unsqueeze(-1) * ds.view(*mask.shape, -1)).sum(1)


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """dW0 of an unfrozen layer by the vendor's matmul: it is no part of adapter training, so no kernel serves it."""
    dz = dy if gain is None else (dy * gain).to(dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        return dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


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
) -> torch.Tensor:
    """Linear layer with a LoRA or DoRA update and an optional echo, by Triton kernels.

    See `echolora_kernels.functional.echo_lora_linear` for the formulas, shapes and errors. Beyond those:

    * ranks from 1 to 256; float16, bfloat16, float32 and float64; any strides;
    * adapters wider than x are cast to x's dtype inside the kernels, sums are kept in float32 (float64 for float64);
    * scaling and dropout_p are compiled into the kernels, so each new value costs one compilation;
    * the echo's mask is a constant.

    Raises:
        BackendUnavailable: x is on a device that no Triton kernel runs on.
        TypeError, ValueError: an argument does not fit, or asks for a gradient that these kernels do not have.
    """
    check_arguments(x, weight, bias, lora_a, lora_b, dropout_p, magnitude, echo, dora_dropout)
    check_limits(x, weight, lora_a, Dropout(dropout_p, dora=dora_dropout), magnitude, echo)
    x, (weight,) = under_autocast(x, [weight])
    dropout = Dropout.draw(dropout_p, x.device, dora_dropout)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, lora_a, lora_b, magnitude, echo, scaling, dropout, False).y
    projection = Projection(weight, bias, lora_a, lora_b, scaling, magnitude, echo)
    return EchoLoRALinearFunction.apply(*apply_arguments(x, weight, projection, dropout))


def under_autocast(x: torch.Tensor, weights: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x and the weights in autocast's dtype where autocast is on."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [weight.to(dtype) for weight in weights]


def apply_arguments(x: torch.Tensor, weight: torch.Tensor, p: Projection, dropout: Dropout) -> tuple[Any, ...]:
    """The arguments of `EchoLoRALinearFunction.apply`."""
    delta, mask, site = (None, None, "output") if p.echo is None else (p.echo.delta, p.echo.mask, p.echo.site)
    return (x, weight, p.bias, p.lora_a, p.lora_b, p.magnitude, delta, mask, site, float(p.scaling), dropout)


def check_limits(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    dropout: Dropout,
    magnitude: torch.Tensor | None,
    echo: Echo | None,
) -> None:
    """Raise where these kernels cannot compute what `check_arguments` lets through."""
    want_runnable(x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, wants one of {', '.join(map(str, DTYPES))}")
    if lora_a.shape[0] > MAX_RANK:
        raise ValueError(f"lora_a: got rank {lora_a.shape[0]}, wants at most {MAX_RANK} on the triton backend")
    if not torch.is_grad_enabled():
        return
    if echo is not None and echo.mask.requires_grad:
        raise ValueError("echo.mask: requires a gradient, wants a constant on the triton backend")
    if weight.requires_grad and magnitude is not None and dropout.on_base:
        raise ValueError("weight: requires a gradient, wants a frozen one for exact DoRA dropout on the triton backend")
