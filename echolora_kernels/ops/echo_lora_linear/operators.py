"""`echolora::` operators: what torch.compile sees of the kernels.

Eager calls go round them (`autograd`), since crossing the boundary of a registered operator costs more than a launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .dropout import Dropout
from .echo import Echo
from .kernels import load
from .passes import ForwardResult, backward_pass, forward_pass, kinds_of
from .projection import Projection
from .rows import accumulator_dtype


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _unfilled(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    magnitude: torch.Tensor | None,
    backend: str,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, z, norm and gain as the operator gives them, but for their values, which an empty batch leaves as they are."""
    rows, d_out = math.prod(x.shape[:-1]), weight.shape[0]
    wide = accumulator_dtype(torch.promote_types(weight.dtype, lora_a.dtype))
    s = x.new_zeros((rows, lora_a.shape[0]), dtype=load(backend).s_dtype(x.dtype, lora_a.dtype))
    z = x.new_zeros((rows, d_out) if store_z else (0,))
    if magnitude is None:
        return s, z, x.new_zeros(0), x.new_zeros(0)
    return s, z, x.new_zeros((d_out,), dtype=wide), x.new_zeros((d_out,), dtype=wide)


def _or_none(tensor: torch.Tensor, present: bool) -> torch.Tensor | None:
    return tensor if present else None


@torch.library.custom_op("echolora::echo_lora_linear", mutates_args=())
def forward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor | None,
    delta: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    backend: str,
    site: str,
    scaling: float,
    dropout_p: float,
    dora_dropout: str,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [..., d_out], S [rows, r], z [rows, d_out], norm [d_out], gain [d_out]; empty where there is none."""
    echo = None if delta is None or mask is None else Echo(delta, mask, site)
    dropout = Dropout(dropout_p, seed, dora_dropout)
    inputs = (x, weight, bias, lora_a, lora_b, magnitude)
    out = forward_pass(load(backend), *inputs, echo, scaling, dropout, store_z)
    if out.s is None:
        return out.y, *_unfilled(x, weight, lora_a, magnitude, backend, store_z)
    s, z, norm, gain = (_or_empty(tensor, x) for tensor in (out.s, out.z, out.norm, out.gain))
    return out.y, s, z, norm, gain


@forward_operator.register_fake
def _(
    x, weight, bias, lora_a, lora_b, magnitude, delta, mask, seed, backend, site, scaling, dropout_p, dora_dropout,
    store_z,
):  # fmt: skip
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, *_unfilled(x, weight, lora_a, magnitude, backend, store_z)


@torch.library.custom_op("echolora::echo_lora_linear_backward", mutates_args=())
def backward_operator(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor | None,
    delta: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    s: torch.Tensor,
    z: torch.Tensor,
    norm: torch.Tensor,
    gain: torch.Tensor,
    backend: str,
    site: str,
    scaling: float,
    dropout_p: float,
    dora_dropout: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients that `needs` (of x, weight, bias, lora_a, lora_b, magnitude, delta) asks for, in that order."""
    dora = magnitude is not None
    out = ForwardResult(dy, s, _or_none(z, needs[5]), _or_none(norm, dora), _or_none(gain, dora))
    inputs = (x, weight, bias, lora_a, lora_b, magnitude, delta)
    inner = delta if site == "adapter_input" else None
    dropout = Dropout(dropout_p, seed, dora_dropout)
    tensors = (dy, x, weight, lora_a, lora_b, inner, mask)
    gradients = backward_pass(load(backend), *tensors, out, site, scaling, dropout, kinds_of(inputs), needs)
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@backward_operator.register_fake
def _(
    dy, x, weight, bias, lora_a, lora_b, magnitude, delta, mask, seed, s, z, norm, gain, backend, site, scaling,
    dropout_p, dora_dropout, needs,
):  # fmt: skip
    inputs = (x, weight, bias, lora_a, lora_b, magnitude, delta)
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *tensors, ctx.backend, ctx.site, ctx.scaling, ctx.dropout_p, ctx.dora_dropout, _ = inputs
    of_weight, of_a = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    ctx.x_shape = x.shape
    ctx.save_for_backward(x if of_weight or of_a else None, *tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:7])
    constants = (ctx.backend, ctx.site, ctx.scaling, ctx.dropout_p, ctx.dora_dropout)
    x, *saved = ctx.saved_tensors
    x = dy.new_empty(()).expand(ctx.x_shape) if x is None else x  # nothing but its shape is read then
    found = iter(backward_operator(dy, x, *saved, *constants, needs))
    return *(next(found) if need else None for need in needs), *[None] * 8


forward_operator.register_autograd(_backward, setup_context=_save)


def compiled_echo_lora_linear(
    backend: str, x: torch.Tensor, weight: torch.Tensor, p: Projection, dropout: Dropout
) -> torch.Tensor:
    """y by the registered operator, for graphs that torch.compile traces."""
    delta, mask, site = (None, None, "output") if p.echo is None else (p.echo.delta, p.echo.mask, p.echo.site)
    store_z = p.magnitude is not None and torch.is_grad_enabled() and p.magnitude.requires_grad
    tensors = (x, weight, p.bias, p.lora_a, p.lora_b, p.magnitude, delta, mask, dropout.seed)
    return forward_operator(*tensors, backend, site, float(p.scaling), dropout.p, dropout.dora, store_z)[0]
