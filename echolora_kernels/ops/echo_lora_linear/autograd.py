"""Triton `echo_lora_linear`: what is saved, which gradients are computed, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .checks import check_arguments
from .configs import MAX_RANK
from .echo import Echo
from .launch import Dropout, want_runnable
from .operators import compiled_echo_lora_linear
from .passes import ForwardResult, backward_pass, forward_pass

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        out = forward_pass(x, weight, bias, lora_a, lora_b, magnitude, echo, scaling, dropout, need_magnitude)
        need_ds = need_x or need_a or (need_delta and site != "output")
        ctx.site, ctx.scaling, ctx.dropout_p = site, scaling, dropout.p
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
        x, weight, lora_a, lora_b, delta, mask, s, z, norm, gain, seed = ctx.saved_tensors
        gradients = backward_pass(
            dy,
            x,
            weight,
            lora_a,
            lora_b,
            delta,
            mask,
            ForwardResult(dy, s, z, norm, gain),
            ctx.site,
            ctx.scaling,
            Dropout(ctx.dropout_p, seed),
            ctx.kinds,
            ctx.needs_input_grad[:7],
        )
        return *gradients, None, None, None, None


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
    check_arguments(x, weight, bias, lora_a, lora_b, dropout_p, magnitude, echo)
    _check_limits(x, weight, lora_a, dropout_p, magnitude, echo)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    dropout = Dropout.draw(dropout_p, x.device)
    if torch.compiler.is_compiling():
        return compiled_echo_lora_linear(x, weight, bias, lora_a, lora_b, magnitude, echo, float(scaling), dropout)
    if not torch.is_grad_enabled():
        return forward_pass(x, weight, bias, lora_a, lora_b, magnitude, echo, scaling, dropout, False).y
    delta, mask, site = (None, None, "output") if echo is None else (echo.delta, echo.mask, echo.site)
    arguments = (x, weight, bias, lora_a, lora_b, magnitude, delta, mask, site, float(scaling), dropout)
    return EchoLoRALinearFunction.apply(*arguments)


def _check_limits(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    dropout_p: float,
    magnitude: torch.Tensor | None,
    echo: Echo | None,
) -> None:
    want_runnable(x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, wants one of {', '.join(map(str, DTYPES))}")
    if lora_a.shape[0] > MAX_RANK:
        raise ValueError(f"lora_a: got rank {lora_a.shape[0]}, wants at most {MAX_RANK} on the triton backend")
    if not torch.is_grad_enabled():
        return
    if echo is not None and echo.mask.requires_grad:
        raise ValueError("echo.mask: requires a gradient, wants a constant on the triton backend")
    if weight.requires_grad and magnitude is not None and dropout_p > 0:
        raise ValueError("weight: requires a gradient, wants a frozen one for DoRA with dropout on the triton backend")
