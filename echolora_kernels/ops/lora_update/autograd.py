"""`lora_update` by kernels: what is saved, when base is written to, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..echo_lora_linear.autograd import DTYPES, traced
from ..echo_lora_linear.dropout import Dropout
from ..echo_lora_linear.kernels import load
from ..echo_lora_linear.passes import kinds_of
from .checks import check_arguments
from .operators import compiled_lora_update
from .passes import backward_pass, forward_pass


class LoRAUpdateFunction(torch.autograd.Function):
    """Saves x itself, S [rows, r], the seed, and z [rows, d_out] where the gain learns; never a mask or a dropped x."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        gain: torch.Tensor | None,
        bias: torch.Tensor | None,
        scaling: float,
        dropout: Dropout,
        backend: str,
        in_place: bool,
    ) -> torch.Tensor:
        _, need_x, need_a, need_b, need_gain, _ = ctx.needs_input_grad[:6]
        inputs = (base, x, lora_a, lora_b, gain, bias)
        y, s, z = forward_pass(load(backend), *inputs, scaling, dropout, in_place=in_place, store_z=need_gain)
        ctx.backend, ctx.scaling, ctx.dropout_p = backend, scaling, dropout.p
        ctx.kinds = kinds_of(inputs)
        ctx.save_for_backward(
            x if need_a else None,
            lora_a if need_x else None,
            lora_b,
            gain,
            s if need_b or need_gain else None,
            z,
            dropout.seed,
        )
        if in_place:
            ctx.mark_dirty(base)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, lora_a, lora_b, gain, s, z, seed = ctx.saved_tensors
        dropout, needs = Dropout(ctx.dropout_p, seed), ctx.needs_input_grad[:6]
        tensors = (x, lora_a, lora_b, gain, s, z)
        gradients = backward_pass(load(ctx.backend), dy, *tensors, ctx.scaling, dropout, ctx.kinds, needs)
        return *gradients, None, None, None, None


def lora_update(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    overwrite_base: bool = False,
    backend: str,
) -> torch.Tensor:
    """The low-rank update of a finished product, by the kernels of `backend`; see `functional.lora_update`.

    Ranks from 1 to the kernels' `max_rank`; float16, bfloat16, float32 and float64; any strides; sums are kept in
    float32 (float64 for float64).

    Raises:
        BackendUnavailable: base is on a device that these kernels do not run on.
        TypeError, ValueError: an argument does not fit.
    """
    check_arguments(base, x, lora_a, lora_b, gain, bias, dropout_p)
    if x.dtype != base.dtype:  # autocast, which would compute the update in base's dtype
        x = x.to(base.dtype)
    kernels = load(backend)
    kernels.want_runnable(base)
    if base.dtype not in DTYPES:
        raise TypeError(f"base: got dtype {base.dtype}, wants one of {', '.join(map(str, DTYPES))}")
    rank, most = lora_a.shape[0], kernels.max_rank
    if rank > most:
        raise ValueError(f"lora_a: got rank {rank}, wants at most {most} on the {backend} backend")
    dropout = Dropout.draw(dropout_p, x.device)
    inputs = (base, x, lora_a, lora_b, gain, bias)
    if traced():
        return compiled_lora_update(backend, *inputs, float(scaling), dropout)
    in_place = overwrite_base and _writable(base, gain)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # else the Function says that it has no jvp
        return forward_pass(kernels, *inputs, scaling, dropout, in_place=in_place, store_z=False)[0]
    return LoRAUpdateFunction.apply(*inputs, float(scaling), dropout, backend, in_place)


def _writable(base: torch.Tensor, gain: torch.Tensor | None) -> bool:
    """Whether y may stand where base is: autograd forbids leaves and views, and a gradient of the gain reads base."""
    if not torch.is_grad_enabled():
        return base.is_contiguous()
    read = gain is not None and gain.requires_grad
    forbidden = base._is_view() or base.is_inference() or (base.is_leaf and base.requires_grad)
    return base.is_contiguous() and not read and not forbidden
