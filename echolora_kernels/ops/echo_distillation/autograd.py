"""The losses by kernels: what is saved, and what `reference` computes by those of any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..echo_lora_linear.autograd import DTYPES, traced, under_autocast
from .checks import check_choices, check_labels, check_linear, check_rows
from .kernels import load
from .linear import chunk_rows_for, linear_pass, scaled_gradients
from .operators import forward_operator, linear_operator
from .passes import backward_pass, forward_pass
from .result import EchoLosses, combined, divisor_of, next_labels


class RowsFunction(torch.autograd.Function):
    """The sums [3]; saves the logits themselves and seven numbers of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        off: torch.Tensor,
        on: torch.Tensor | None,
        targets: torch.Tensor,
        backend: str,
        temperature: float,
        off_learns: bool,
        on_learns: bool,
    ) -> torch.Tensor:
        sums, stats = forward_pass(off, on, targets, backend, temperature)
        ctx.save_for_backward(off, on, targets, stats)
        ctx.constants = (backend, temperature, off_learns, on_learns)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        arguments = (d_sums, *ctx.saved_tensors, *ctx.constants, needs)
        found = iter(backward_pass(*arguments))
        return *(next(found) if need else None for need in needs), *[None] * 5


class LinearFunction(torch.autograd.Function):
    """The sum of the losses, and the sums [3] without gradients; saves the gradients of the hidden states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, sums, d_hidden = linear_pass(*arguments)
        ctx.needs = arguments[-1]
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return *scaled_gradients(d_hidden, d_total, ctx.needs), *[None] * 10


def echo_distillation(
    logits_off: torch.Tensor, logits_on: torch.Tensor | None, labels: torch.Tensor, **options: Any
) -> EchoLosses:
    """The loss of one step, from logits at every position; options as `echo_distillation_rows`."""
    check_labels(logits_off, logits_on, labels)
    return echo_distillation_rows(logits_off, logits_on, next_labels(labels), **options)


def echo_distillation_rows(
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
    backend: str,
) -> EchoLosses:
    """The loss of one step, from logits of which each row predicts its target."""
    check_rows(logits_off, logits_on, targets)
    check_choices(temperature, kd_weight, kd_detach, num_items)
    if logits_on is not None and logits_on.dtype != logits_off.dtype:
        both = torch.promote_types(logits_off.dtype, logits_on.dtype)
        logits_off, logits_on = logits_off.to(both), logits_on.to(both)
    _check_limits(backend, "logits_off", logits_off)
    learns = (kd_detach != "off", kd_detach != "on")
    arguments = (logits_off, logits_on, targets, backend, float(temperature), *learns)
    sums = forward_operator(*arguments)[0] if traced() else RowsFunction.apply(*arguments)
    routed = logits_on is not None
    parts = (sums[0], sums[1] if routed else None, sums[2] if routed else None)
    return combined(*parts, targets, temperature, kd_weight, num_items)


def echo_distillation_linear(
    hidden_off: torch.Tensor,
    hidden_on: torch.Tensor | None,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str,
) -> EchoLosses:
    """The loss of one step, from hidden states and a frozen head."""
    check_linear(hidden_off, hidden_on, weight, bias, targets, chunk_rows)
    check_choices(temperature, kd_weight, kd_detach, num_items)
    others = [tensor for tensor in (weight, bias, hidden_on) if tensor is not None]
    hidden_off, others = under_autocast(hidden_off, others)
    weight = others.pop(0)
    bias = None if bias is None else others.pop(0)
    hidden_on = None if hidden_on is None else others.pop(0)
    _check_limits(backend, "hidden_off", hidden_off)
    needs = [
        torch.is_grad_enabled() and hidden is not None and hidden.requires_grad for hidden in (hidden_off, hidden_on)
    ]
    chunk_rows = chunk_rows or chunk_rows_for(weight.shape[0], weight.dtype)
    learns = (kd_detach != "off", kd_detach != "on")
    constants = (backend, float(temperature), float(kd_weight), *learns, chunk_rows, needs)
    arguments = (hidden_off, hidden_on, weight, bias, targets, *constants)
    total, sums = linear_operator(*arguments)[:2] if traced() else LinearFunction.apply(*arguments)
    routed = hidden_on is not None
    parts = (sums[0], sums[1] if routed else None, sums[2] if routed else None)
    losses = combined(*parts, targets, temperature, kd_weight, num_items)
    return losses._replace(loss=total / divisor_of(targets, num_items))


def _check_limits(backend: str, name: str, tensor: torch.Tensor) -> None:
    """Raise where these kernels cannot compute what the reference can."""
    load(backend).want_runnable(tensor, name)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wants one of {', '.join(map(str, DTYPES))}")
