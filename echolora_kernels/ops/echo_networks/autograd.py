"""`echo_networks` by kernels: what is saved for the backward pass, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..echo_lora_linear.autograd import traced
from ..echo_lora_linear.kernels import load as load_kernels
from .checks import check_arguments
from .operators import forward_operator
from .passes import backward_pass, forward_pass, load


class EchoNetworksFunction(torch.autograd.Function):
    """Saves its arguments and H; projections and gates are computed again in the backward pass, which reads W2 and U2
    anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        down: torch.Tensor,
        proj_up: torch.Tensor,
        gate_up: torch.Tensor,
        gate_bias: torch.Tensor,
        scale: torch.Tensor,
        widths: list[int],
        backend: str,
    ) -> torch.Tensor:
        tensors = (u, down, proj_up, gate_up, gate_bias, scale)
        delta, h = forward_pass(backend, tensors, widths)
        ctx.widths, ctx.backend = widths, backend
        ctx.save_for_backward(*tensors, h)
        return delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddelta: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, h = ctx.saved_tensors
        need_u = ctx.needs_input_grad[0]
        du, *gradients = backward_pass(ctx.backend, ddelta, tensors, h, ctx.widths, need_u)
        return du if need_u else None, *gradients, None, None


def echo_networks(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
    *,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """The echo vectors of every module by the kernels of `backend`; see `functional.echo_networks`.

    Sums are kept in float32 (float64 for float64); any strides. "triton": m up to 256.

    Raises:
        BackendUnavailable: u is on a device that these kernels do not run on.
        TypeError, ValueError: an argument does not fit.
    """
    tensors, sizes = (u, down, proj_up, gate_up, gate_bias, scale), list(widths)
    check_arguments(*tensors, sizes)
    load_kernels(backend).want_runnable(u)
    m, most = proj_up.shape[1], load(backend).MAX_BOTTLENECK
    if most is not None and m > most:
        raise ValueError(f"proj_up: got m = {m}, wants at most {most} on the {backend} backend")
    if traced():
        delta = forward_operator(*tensors, sizes, backend)[0]
    else:
        delta = EchoNetworksFunction.apply(*tensors, sizes, backend)
    # the gradients of the parts come back as one, which is what a launch for all modules wants
    parts = delta.split([u.shape[0] * width for width in sizes])
    return tuple(part.view(u.shape[0], width) for part, width in zip(parts, sizes, strict=True))
