"""`echolora::` operators of the losses: what torch.compile sees of the kernels.

Eager calls go round them (`autograd`): the first call of one imports all of torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..echo_lora_linear.rows import accumulator_dtype
from .kernels import STATS
from .linear import linear_pass, scaled_gradients
from .passes import backward_pass, forward_pass


@torch.library.custom_op("echolora::echo_distillation", mutates_args=())
def forward_operator(
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    backend: str,
    temperature: float,
    off_learns: bool,
    on_learns: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [3], and what the backward pass wants to know of each row; see `kernels.Kernels`."""
    return forward_pass(off, on, targets, backend, temperature)


@forward_operator.register_fake
def _(off, on, targets, backend, temperature, off_learns, on_learns):
    wide = accumulator_dtype(off.dtype)
    return off.new_empty((3,), dtype=wide), off.new_empty((targets.numel(), STATS), dtype=wide)


@torch.library.custom_op("echolora::echo_distillation_backward", mutates_args=())
def backward_operator(
    d_sums: torch.Tensor,
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    stats: torch.Tensor,
    backend: str,
    temperature: float,
    off_learns: bool,
    on_learns: bool,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients of off and on that `needs` asks for."""
    return backward_pass(d_sums, off, on, targets, stats, backend, temperature, off_learns, on_learns, needs)


@backward_operator.register_fake
def _(d_sums, off, on, targets, stats, backend, temperature, off_learns, on_learns, needs):
    return [off.new_empty(off.shape) for need in needs if need]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    off, on, targets, *ctx.constants = inputs
    ctx.save_for_backward(off, on, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_sums: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    found = iter(backward_operator(d_sums, *ctx.saved_tensors, *ctx.constants, needs))
    return *(next(found) if need else None for need in needs), *[None] * 5


forward_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("echolora::echo_distillation_linear", mutates_args=())
def linear_operator(
    hidden_off: torch.Tensor,
    hidden_on: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    backend: str,
    temperature: float,
    kd_weight: float,
    off_learns: bool,
    on_learns: bool,
    chunk_rows: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses over the rows, sums [3], and the gradient of the first for the hidden states in `needs`.

    Returns:
        [], [3], and [R, how many are needed, d] in the dtype of the hidden states.
    """
    inputs = (hidden_off, hidden_on, weight, bias, targets)
    return linear_pass(*inputs, backend, temperature, kd_weight, off_learns, on_learns, chunk_rows, needs)


@linear_operator.register_fake
def _(
    hidden_off, hidden_on, weight, bias, targets, backend, temperature, kd_weight, off_learns, on_learns, chunk_rows,
    needs,
):  # fmt: skip
    wide = accumulator_dtype(hidden_off.dtype)
    d_hidden = hidden_off.new_empty((hidden_off.shape[0], sum(needs), hidden_off.shape[1]))
    return hidden_off.new_empty((), dtype=wide), hidden_off.new_empty((3,), dtype=wide), d_hidden


def _save_linear(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.needs = inputs[-1]
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward_linear(ctx: Any, d_total: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    (d_hidden,) = ctx.saved_tensors
    return *scaled_gradients(d_hidden, d_total, ctx.needs), *[None] * 10


linear_operator.register_autograd(_backward_linear, setup_context=_save_linear)
