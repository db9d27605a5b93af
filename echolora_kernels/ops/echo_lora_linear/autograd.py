"""`echo_lora_linear` by kernels: what is saved, which gradients are computed, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .checks import check_arguments
from .dropout import Dropout
from .echo import Echo
from .kernels import load
from .operators import compiled_echo_lora_linear
from .passes import ForwardResult, backward_pass, forward_pass, kinds_of
from .projection import Projection
from .rows import autocast_narrows

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
        backend: str,
    ) -> torch.Tensor:
        need_x, need_weight, _, need_a, need_b, need_magnitude, need_delta = ctx.needs_input_grad[:7]
        echo = None if delta is None or mask is None else Echo(delta, mask, site)
        inputs = (x, weight, bias, lora_a, lora_b, magnitude)
        out = forward_pass(load(backend), *inputs, echo, scaling, dropout, need_magnitude)
        need_ds = need_x or need_a or (need_delta and site != "output")
        ctx.backend, ctx.site, ctx.scaling, ctx.dropout = backend, site, scaling, (dropout.p, dropout.dora)
        ctx.kinds = kinds_of((*inputs, delta))
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            lora_a if need_x or (need_delta and site == "adapter_input") else None,
            lora_b,
            delta if need_a and site == "adapter_input" else None,
            mask if need_delta or site == "adapter_input" else None,
            out.s if need_b or need_ds or need_magnitude else None,
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
            load(ctx.backend),
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
            Dropout(ctx.dropout[0], seed, ctx.dropout[1]),
            ctx.kinds,
            ctx.needs_input_grad[:7],
        )
        return *gradients, None, None, None, None, None


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
    backend: str,
) -> torch.Tensor:
    """Linear layer with a LoRA or DoRA update and an optional echo, by the kernels of `backend`.

    See `echolora_kernels.functional.echo_lora_linear` for the formulas, shapes and errors. Beyond those:

    * ranks from 1 to the kernels' `max_rank`; float16, bfloat16, float32 and float64; any strides;
    * sums are kept in float32 (float64 for float64);
    * the echo's mask is a constant;
    * "triton": ranks up to 256; adapters wider than x are cast to x's dtype inside the kernels; scaling and dropout_p
      are compiled into the kernels, so each new value costs one compilation.

    Raises:
        BackendUnavailable: x is on a device that these kernels do not run on.
        TypeError, ValueError: an argument does not fit, or asks for a gradient that these kernels do not have.
    """
    check_arguments(x, weight, bias, lora_a, lora_b, dropout_p, magnitude, echo, dora_dropout)
    x, (weight,) = under_autocast(x, (weight,))
    only = Projection(weight, bias, lora_a, lora_b, scaling, magnitude, echo)
    check_limits(backend, x, only, dropout_p, dora_dropout)
    return apply(backend, x, weight, only, Dropout.draw(dropout_p, x.device, dora_dropout))


def apply(backend: str, x: torch.Tensor, weight: torch.Tensor, p: Projection, dropout: Dropout) -> torch.Tensor:
    """y of one projection, `weight` in place of its own: traced, without gradients, or by the autograd Function."""
    if traced():
        return compiled_echo_lora_linear(backend, x, weight, p, dropout)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # else the Function says that it has no jvp
        inputs = (x, weight, p.bias, p.lora_a, p.lora_b, p.magnitude, p.echo)
        return forward_pass(load(backend), *inputs, p.scaling, dropout, False).y
    delta, mask, site = (None, None, "output") if p.echo is None else (p.echo.delta, p.echo.mask, p.echo.site)
    tensors = (x, weight, p.bias, p.lora_a, p.lora_b, p.magnitude, delta, mask)
    return EchoLoRALinearFunction.apply(*tensors, site, float(p.scaling), dropout, backend)


def traced() -> bool:
    """Whether tensors are not what kernels can compute with: torch.compile, or a mode such as fake tensors'."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def under_autocast(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x and the weights in autocast's dtype where autocast is on."""
    if not autocast_narrows(x):
        return x, list(weights)
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [weight.to(dtype) for weight in weights]


def check_limits(backend: str, x: torch.Tensor, p: Projection, dropout_p: float, dora_dropout: str) -> None:
    """Raise where these kernels cannot compute what `check_arguments` lets through; x is as they will see it."""
    kernels = load(backend)
    kernels.want_runnable(x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, wants one of {', '.join(map(str, DTYPES))}")
    rank, most = p.lora_a.shape[0], kernels.max_rank
    if rank > most:
        raise ValueError(f"lora_a: got rank {rank}, wants at most {most} on the {backend} backend")
    if not torch.is_grad_enabled():
        return
    if p.echo is not None and p.echo.mask.requires_grad:
        raise ValueError(f"echo.mask: requires a gradient, wants a constant on the {backend} backend")
    two_products = p.magnitude is not None and dropout_p > 0 and dora_dropout == "exact"
    if p.weight.requires_grad and two_products:
        raise ValueError(
            f"weight: requires a gradient, wants a frozen one for exact DoRA dropout on the {backend} backend"
        )
