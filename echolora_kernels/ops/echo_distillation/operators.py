"""`echolora::` operators of the losses: what autograd and torch.compile see of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..echo_lora_linear.rows import accumulator_dtype, as_rows
from .kernels import STATS, load
from .linear import linear_pass


def _rows_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else as_rows(tensor)


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
    return load(backend).forward(as_rows(off), _rows_or_none(on), targets.reshape(-1).contiguous(), temperature)


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
    results = [off.new_empty(off.shape) if need else None for need in needs]
    load(backend).backward(
        as_rows(off),
        _rows_or_none(on),
        targets.reshape(-1).contiguous(),
        stats,
        temperature,
        d_sums.contiguous(),
        (off_learns, on_learns),
        *map(_rows_or_none, results),
    )
    return [result for result in results if result is not None]


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
    return linear_pass(
        load(backend),
        hidden_off,
        hidden_on,
        weight,
        bias,
        targets,
        temperature,
        kd_weight,
        (off_learns, on_learns),
        chunk_rows,
        (needs[0], needs[1]),
    )


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
    # in the wide dtype: a factor rounded to half precision would be an error that all rows share
    scaled = iter((d_hidden.to(d_total.dtype) * d_total).to(d_hidden.dtype).unbind(1))
    return *(next(scaled) if need else None for need in ctx.needs), *[None] * 10


linear_operator.register_autograd(_backward_linear, setup_context=_save_linear)
