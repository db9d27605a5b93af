"""`echolora::` operators: what torch.compile sees of the kernels. Eager calls go round them (`autograd`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..echo_lora_linear.dropout import Dropout
from ..echo_lora_linear.kernels import load
from ..echo_lora_linear.passes import Maybe, kinds_of
from .passes import backward_pass, forward_pass


@torch.library.custom_op("echolora::lora_update", mutates_args=())
def forward_operator(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    backend: str,
    scaling: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and S [rows, r]; what the gain's gradient wants is base, and an operator may not return its argument."""
    kernels, dropout = load(backend), Dropout(dropout_p, seed)
    inputs = (base, x, lora_a, lora_b, gain, bias)
    y, s, _ = forward_pass(kernels, *inputs, scaling, dropout, in_place=False, store_z=False)
    s = base.new_empty((0, len(lora_a)), dtype=kernels.s_dtype(x.dtype, lora_a.dtype)) if s is None else s
    return y, s


@forward_operator.register_fake
def _(base, x, lora_a, lora_b, gain, bias, seed, backend, scaling, dropout_p):
    s_dtype = load(backend).s_dtype(x.dtype, lora_a.dtype)
    s = base.new_empty((math.prod(x.shape[:-1]), lora_a.shape[0]), dtype=s_dtype)
    return base.new_empty(base.shape), s


@torch.library.custom_op("echolora::lora_update_backward", mutates_args=())
def backward_operator(
    dy: torch.Tensor,
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    s: torch.Tensor,
    backend: str,
    scaling: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients that `needs` (of base, x, lora_a, lora_b, gain, bias) asks for, in that order."""
    inputs = (base, x, lora_a, lora_b, gain, bias)
    of_gain: Maybe = base.reshape(-1, base.shape[-1]).contiguous() if needs[4] else None
    gradients = backward_pass(
        load(backend),
        dy,
        x,
        lora_a,
        lora_b,
        gain,
        s,
        of_gain,
        scaling,
        Dropout(dropout_p, seed),
        kinds_of(inputs),
        needs,
    )
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@backward_operator.register_fake
def _(dy, base, x, lora_a, lora_b, gain, bias, seed, s, backend, scaling, dropout_p, needs):
    inputs = (base, x, lora_a, lora_b, gain, bias)
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    base, *tensors, ctx.backend, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(base if ctx.needs_input_grad[4] else None, *tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    base, *saved = ctx.saved_tensors
    gain = saved[3]
    needs = list(ctx.needs_input_grad[:6])
    asked = [needs[0] and gain is not None, *needs[1:]]  # else base's gradient is dy, and no operator may return that
    constants = (ctx.backend, ctx.scaling, ctx.dropout_p, asked)
    base = dy if base is None else base  # nothing but its shape is read then
    found = iter(backward_operator(dy, base, *saved, *constants) if any(asked) else ())
    dbase, *rest = (next(found) if ask else None for ask in asked)
    return dy if needs[0] and gain is None else dbase, *rest, *[None] * 4


forward_operator.register_autograd(_backward, setup_context=_save)


def compiled_lora_update(
    backend: str,
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    dropout: Dropout,
) -> torch.Tensor:
    """y by the registered operator, for graphs that torch.compile traces; base is left as it is."""
    tensors = (base, x, lora_a, lora_b, gain, bias, dropout.seed)
    return forward_operator(*tensors, backend, scaling, dropout.p)[0]
