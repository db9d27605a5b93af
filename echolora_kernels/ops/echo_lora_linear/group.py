"""`echo_lora_linear_group` by kernels: x is read once for all projections' S, once for all their dA; dX accumulates.

F1 and B2 run once, on the stacked A's. Echoes inside the adapters become a rank-space echo, A Delta instead of Delta:
the same by linearity, and the stacked kernel needs one site only. F2, B1 and B3 run once a projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .autograd import apply, check_limits, traced, under_autocast
from .checks import check_group
from .dropout import Dropout
from .echo import Echo
from .kernels import load
from .passes import Maybe, from_sums, inner_sums, kinds_of
from .projection import Projection
from .rows import accumulator_dtype, as_rows

_TENSORS = 7  # of one projection, in the order of `_flatten`
_FIXED = 4  # arguments before them


def _flatten(p: Projection) -> tuple[torch.Tensor | None, ...]:
    delta, mask = (None, None) if p.echo is None else (p.echo.delta, p.echo.mask)
    return p.weight, p.bias, p.lora_a, p.lora_b, p.magnitude, delta, mask


def _stack(
    projections: Sequence[Projection], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scaled A's [R, K] in S's dtype, and the echoes inside the adapters as rank-space delta [n, R] and their mask."""
    wide = accumulator_dtype(dtype)
    stacked = torch.cat([(p.lora_a.to(wide) * p.scaling).to(dtype) for p in projections])
    inner = [p.echo for p in projections if p.echo is not None and p.echo.site != "output"]
    if not inner:
        return stacked, None, None
    deltas = []
    for p in projections:
        if p.echo is None or p.echo.site == "output":
            deltas.append(stacked.new_zeros((len(inner[0].delta), len(p.lora_a)), dtype=wide))
        elif p.echo.site == "rank":
            deltas.append(p.echo.delta.to(wide) * p.scaling)
        else:
            deltas.append(p.echo.delta.to(wide) @ p.lora_a.to(wide).t() * p.scaling)
    return stacked, torch.cat(deltas, 1), inner[0].mask


class EchoLoRALinearGroupFunction(torch.autograd.Function):
    """Saves what `EchoLoRALinearFunction` saves, with x, the stacked S and the seed once."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropout: Dropout, backend: str, fixed: list[tuple[str, float]], *tensors: Maybe
    ) -> tuple[torch.Tensor, ...]:
        kernels = load(backend)
        projections = _unflatten(fixed, tensors)
        rows = as_rows(x)
        with torch.autocast(x.device.type, enabled=False):
            stacked, delta, mask = _stack(projections, kernels.s_dtype(x.dtype, projections[0].lora_a.dtype))
        site = "none" if delta is None else "rank"
        s = kernels.shrink(rows, stacked, 1.0, dropout=dropout, site=site, delta=delta, mask=mask)
        outputs, saved, start = [], [], 0
        for index, p in enumerate(projections):
            needs = ctx.needs_input_grad[_FIXED + index * _TENSORS :][:_TENSORS]
            norm = gain = None
            if p.magnitude is not None:
                norm, gain = kernels.dora_norm(p.weight, p.lora_a, p.lora_b, p.scaling, p.magnitude)
            outer = p.echo if p.echo is not None and p.echo.site == "output" else None
            stop = start + len(p.lora_a)
            y, z = kernels.linear_product(
                rows,
                p.weight,
                s[:, start:stop],
                p.lora_b,
                bias=p.bias,
                gain=gain,
                delta=None if outer is None else outer.delta,
                mask=None if outer is None else outer.mask,
                dropout=dropout,
                store_z=needs[4],
                shape=(*x.shape[:-1], len(p.weight)),
            )
            outputs.append(y)
            saved += [z, norm, gain]
            start = stop
        ctx.backend, ctx.fixed, ctx.count = backend, fixed, len(projections)
        ctx.dropout = dropout.p, dropout.dora
        ctx.save_for_backward(x, s, dropout.seed, *tensors, *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernels = load(ctx.backend)
        x, s, seed, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.count * _TENSORS], rest[ctx.count * _TENSORS :]
        projections = _unflatten(ctx.fixed, tensors)
        needs = [ctx.needs_input_grad[_FIXED + i * _TENSORS :][:_TENSORS] for i in range(ctx.count)]
        dropout = Dropout(ctx.dropout[0], seed, ctx.dropout[1])
        need_x, need_a = ctx.needs_input_grad[0], any(need[2] for need in needs)
        gradients: list[list[Maybe]] = []
        ds: list[Maybe] = []
        start = 0
        for p, need, dy, z, norm, gain in zip(
            projections, needs, dys, saved[0::3], saved[1::3], saved[2::3], strict=True
        ):
            stop = start + len(p.lora_a)
            mask, site = (None, "output") if p.echo is None else (p.echo.mask, p.echo.site)
            inner_delta = need[5] and site != "output"
            sums = kernels.adapter_backward(
                as_rows(dy),
                s[:, start:stop],
                p.lora_b,
                p.scaling,
                gain=gain,
                z=z,
                mask=mask if site == "output" else None,
                need_ds=need_x or need_a or inner_delta,
                need_lora_b=need[3],
                need_bias=need[1],
                need_gain=need[4],
                need_delta=need[5] and not inner_delta,
            )
            kinds = kinds_of(_flatten(p))[1:6]
            dbias, db, dmagnitude, ddelta = from_sums(sums, p.lora_a, mask, norm, site, kinds, inner_delta)
            start = stop
            ds.append(sums.ds)
            gradients.append([None, dbias, None, db, dmagnitude, ddelta, None])
        stacked_ds: Maybe = torch.cat(ds, 1) if need_x or need_a else None
        if need_a:
            da = kernels.lora_a_backward(as_rows(x), stacked_ds, dropout=dropout, dtype=accumulator_dtype(s.dtype))
            for p, need, d, own, part in zip(
                projections, needs, ds, gradients, da.split([len(p.lora_a) for p in projections]), strict=True
            ):
                if need[2]:
                    own[2] = _with_echo(part, p, d).to(p.lora_a.dtype)
        dx = None
        if need_x:
            dx = kernels.group_input_product(
                [as_rows(dy) for dy in dys], projections, ds, stacked_ds, gains=saved[2::3], dropout=dropout
            ).view(x.shape)
        return dx, None, None, None, *(gradient for own in gradients for gradient in own)


def _unflatten(fixed: list[tuple[str, float]], tensors: Sequence[Maybe]) -> list[Projection]:
    projections = []
    for index, (site, scaling) in enumerate(fixed):
        weight, bias, lora_a, lora_b, magnitude, delta, mask = tensors[index * _TENSORS :][:_TENSORS]
        echo = None if delta is None else Echo(delta, mask, site)
        projections.append(Projection(weight, bias, lora_a, lora_b, scaling, magnitude, echo))
    return projections


def _with_echo(da: torch.Tensor, p: Projection, ds: torch.Tensor) -> torch.Tensor:
    """dA including the echo at the adapter's input: its part of dS^T (drop(x) + M Delta) is (sum of dS)^T Delta."""
    if p.echo is None or p.echo.site != "adapter_input":
        return da
    with torch.autocast(da.device.type, enabled=False):
        return da + inner_sums(ds, p.echo.mask).t().to(da.dtype) @ p.echo.delta.to(da.dtype)


def echo_lora_linear_group(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    dora_dropout: str = "exact",
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """Several adapted linears of one input, by the kernels of `backend`.

    See `echolora_kernels.functional.echo_lora_linear_group`. Projections whose ranks add up to more than the kernels'
    `max_rank`, that share no mask for echoes inside the adapter, or that train a weight, and calls that are
    traced, are computed one by one with one dropout mask.
    """
    check_group(x, projections, dropout_p, dora_dropout)
    x, weights = under_autocast(x, [p.weight for p in projections])
    for p in projections:
        check_limits(backend, x, p, dropout_p, dora_dropout)
    dropout = Dropout.draw(dropout_p, x.device, dora_dropout)
    masks = {id(p.echo.mask) for p in projections if p.echo is not None and p.echo.site != "output"}
    together = (
        sum(len(p.lora_a) for p in projections) <= load(backend).max_rank
        and len(masks) <= 1
        and not any(weight.requires_grad for weight in weights)
        and math.prod(x.shape[:-1]) > 0
        and not traced()
    )
    if not together:
        return tuple(apply(backend, x, weight, p, dropout) for p, weight in zip(projections, weights, strict=True))
    fixed = [("output" if p.echo is None else p.echo.site, float(p.scaling)) for p in projections]
    tensors = [t for p, weight in zip(projections, weights, strict=True) for t in (weight, *_flatten(p)[1:])]
    return EchoLoRALinearGroupFunction.apply(x, dropout, backend, fixed, *tensors)
