"""`echolora::` operators: what torch.compile sees of the kernels. Eager calls go round them (`autograd`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..echo_lora_linear.rows import accumulator_dtype
from .passes import backward_pass, forward_pass


@torch.library.custom_op("echolora::echo_networks", mutates_args=())
def forward_operator(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta [N * sum of widths] and H [N, 2 n m]."""
    return forward_pass(backend, (u, down, proj_up, gate_up, gate_bias, scale), widths)


@forward_operator.register_fake
def _(u, down, proj_up, gate_up, gate_bias, scale, widths, backend):
    h = u.new_empty((u.shape[0], down.shape[0]), dtype=accumulator_dtype(u.dtype))
    return u.new_empty(u.shape[0] * proj_up.shape[0]), h


@torch.library.custom_op("echolora::echo_networks_backward", mutates_args=())
def backward_operator(
    ddelta: torch.Tensor,
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    h: torch.Tensor,
    widths: Sequence[int],
    backend: str,
    need_u: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of u, empty without need_u, and of down, proj_up, gate_up, gate_bias and scale."""
    tensors = (u, down, proj_up, gate_up, gate_bias, scale)
    return backward_pass(backend, ddelta, tensors, h, widths, need_u)  # type: ignore[return-value]


@backward_operator.register_fake
def _(ddelta, u, down, proj_up, gate_up, gate_bias, scale, h, widths, backend, need_u):
    parameters = (down, proj_up, gate_up, gate_bias, scale)
    return u.new_empty(u.shape if need_u else (0,)), *(tensor.new_empty(tensor.shape) for tensor in parameters)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.widths, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, ddelta: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    need_u = ctx.needs_input_grad[0]
    du, *gradients = backward_operator(ddelta, *ctx.saved_tensors, ctx.widths, ctx.backend, need_u)
    return du if need_u else None, *gradients, None, None


forward_operator.register_autograd(_backward, setup_context=_save)
