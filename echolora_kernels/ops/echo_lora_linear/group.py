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
from .kernels import Kernels, load
from .passes import ForwardResult, Maybe, from_sums, inner_sums, kinds_of
from .projection import Projection
from .rows import accumulator_dtype, as_rows, without_autocast

_TENSORS = 7  # of one projection, in the order of `_flatten`
_FIXED = 5  # arguments before them


def _flatten(p: Projection) -> tuple[torch.Tensor | None, ...]:
    delta, mask = (None, None) if p.echo is None else (p.echo.delta, p.echo.mask)
    return p.weight, p.bias, p.lora_a, p.lora_b, p.magnitude, delta, mask


def _stack(
    projections: Sequence[Projection], dtype: torch.dtype
) -> tuple[torch.Tensor, float, torch.Tensor | None, torch.Tensor | None]:
    """The A's [R, K] in S's dtype and their scaling; the echoes inside the adapters as rank-space delta [n, R], mask."""
    wide, scaling = accumulator_dtype(dtype), projections[0].scaling
    if any(p.scaling != scaling for p in projections):
        scaling = 1.0
    factors = [1.0 if p.scaling == scaling else p.scaling for p in projections]
    stacked = torch.cat(
        [
            p.lora_a.to(dtype) if factor == 1.0 else (p.lora_a.to(wide) * factor).to(dtype)
            for p, factor in zip(projections, factors, strict=True)
        ]
    )
    inner = [p.echo for p in projections if p.echo is not None and p.echo.site != "output"]
    if not inner:
        return stacked, scaling, None, None
    deltas = []
    for p, factor in zip(projections, factors, strict=True):
        if p.echo is None or p.echo.site == "output":
            deltas.append(stacked.new_zeros((len(inner[0].delta), len(p.lora_a)), dtype=wide))
        elif p.echo.site == "rank":
            deltas.append(p.echo.delta.to(wide) * factor)
        else:
            deltas.append(p.echo.delta.to(wide) @ p.lora_a.to(wide).t() * factor)
    return stacked, scaling, torch.cat(deltas, 1), inner[0].mask


class EchoLoRALinearGroupFunction(torch.autograd.Function):
    """Saves what `EchoLoRALinearFunction` saves, with x, the stacked S and the seed once.

    An output that no loss depends on leaves its projection without gradients, as it would have been alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropout: Dropout,
        backend: str,
        fixed: list[tuple[str, float]],
        differentiable: bool,
        *tensors: Maybe,
    ) -> tuple[torch.Tensor, ...]:
        projections = _unflatten(fixed, tensors)
        need_x, need_a = ctx.needs_input_grad[0], any(ctx.needs_input_grad[_FIXED + 2 :: _TENSORS])
        needs_z = [differentiable and need for need in ctx.needs_input_grad[_FIXED + 4 :: _TENSORS]]
        s, found = _forward(load(backend), x, projections, dropout, needs_z)
        saved = []
        for p, out in zip(projections, found, strict=True):
            weight, _, lora_a, lora_b, _, *echo = _flatten(p)
            if p.echo is None or p.echo.site != "adapter_input":
                lora_a = lora_a if need_x else None
            saved += [weight if need_x else None, None, lora_a, lora_b, None, *echo, out.z, out.norm, out.gain]
        ctx.backend, ctx.fixed, ctx.dropout = backend, fixed, (dropout.p, dropout.dora)
        ctx.kinds = [kinds_of(_flatten(p)) for p in projections]
        ctx.save_for_backward(x if need_a else None, s, dropout.seed, *saved)
        ctx.set_materialize_grads(False)
        return tuple(out.y for out in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Maybe) -> tuple[torch.Tensor | None, ...]:
        kernels = load(ctx.backend)
        x, s, seed, *saved = ctx.saved_tensors
        count = len(ctx.kinds)
        each = [saved[i * (_TENSORS + 3) :][: _TENSORS + 3] for i in range(count)]
        projections = _unflatten(ctx.fixed, [tensor for tensors in each for tensor in tensors[:_TENSORS]])
        needs = [ctx.needs_input_grad[_FIXED + i * _TENSORS :][:_TENSORS] for i in range(count)]
        dropout = Dropout(ctx.dropout[0], seed, ctx.dropout[1])
        used = [index for index, dy in enumerate(dys) if dy is not None]
        need_x, need_a = ctx.needs_input_grad[0], any(needs[index][2] for index in used)
        gradients: list[list[Maybe]] = [[None] * _TENSORS for _ in range(count)]
        ds: list[Maybe] = []
        dx: Maybe = None
        parts = s.split([p.lora_b.shape[1] for p in projections], 1)
        if need_x and all(_all_small(kernels, dys[i], projections[i], each[i][-1], needs[i]) for i in used):
            for index in used:
                p, dy = projections[index], as_rows(dys[index])
                dx, *gradients[index][2:4] = kernels.small_backward(
                    dy, as_rows(x), p.weight, parts[index], p.lora_a, p.lora_b, p.scaling, dropout=dropout, base=dx
                )
            return _flat_gradients(dx if dx is None else dx.view(x.shape), gradients)
        for index in used:
            p, need, kinds, (z, norm, gain) = projections[index], needs[index], ctx.kinds[index], each[index][_TENSORS:]
            mask, site = (None, "output") if p.echo is None else (p.echo.mask, p.echo.site)
            inner_delta = need[5] and site != "output"
            sums = kernels.adapter_backward(
                as_rows(dys[index]),
                parts[index],
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
            ds.append(sums.ds)
            dbias, db, dmagnitude, ddelta = from_sums(sums, p.lora_a, mask, norm, site, kinds[1:6], inner_delta)
            gradients[index] = [None, dbias, None, db, dmagnitude, ddelta, None]
        members = [projections[index] for index in used]
        stacked_ds: Maybe = torch.cat(ds, 1) if used and (need_x or need_a) else None
        if need_a:
            da = kernels.lora_a_backward(as_rows(x), stacked_ds, dropout=dropout, dtype=accumulator_dtype(s.dtype))
            for index, p, d, part in zip(used, members, ds, da.split([d.shape[1] for d in ds]), strict=True):
                if needs[index][2]:
                    gradients[index][2] = _with_echo(part, p, d).to(ctx.kinds[index][2][1])
        if used and need_x:
            rows, gains = [as_rows(dys[index]) for index in used], [each[index][-1] for index in used]
            dx = kernels.group_input_product(rows, members, ds, stacked_ds, gains=gains, dropout=dropout)
            dx = dx.view(*dys[used[0]].shape[:-1], dx.shape[-1])
        return _flat_gradients(dx, gradients)


def _forward(
    kernels: Kernels, x: torch.Tensor, projections: Sequence[Projection], dropout: Dropout, needs_z: Sequence[bool]
) -> tuple[torch.Tensor, list[ForwardResult]]:
    """All S side by side, and what each projection's forward pass leaves behind besides."""
    rows, ranks = as_rows(x), [len(p.lora_a) for p in projections]
    shapes = [(*x.shape[:-1], p.weight.shape[0]) for p in projections]
    found = []
    if all(_small(kernels, rows, p) for p in projections):
        s = rows.new_empty((rows.shape[0] * rows.shape[1], sum(ranks)))
        for p, part, shape in zip(projections, s.split(ranks, 1), shapes, strict=True):
            _, y = kernels.small_forward(
                rows, p.weight, p.lora_a, p.lora_b, p.scaling, bias=p.bias, dropout=dropout, shape=shape, s=part
            )
            found.append(ForwardResult(y, None, None, None, None))
        return s, found
    with without_autocast(x):
        stacked, scaling, delta, mask = _stack(projections, kernels.s_dtype(x.dtype, projections[0].lora_a.dtype))
    site = "none" if delta is None else "rank"
    s = kernels.shrink(rows, stacked, scaling, dropout=dropout, site=site, delta=delta, mask=mask)
    for p, part, shape, need_z in zip(projections, s.split(ranks, 1), shapes, needs_z, strict=True):
        norm = gain = None
        if p.magnitude is not None:
            norm, gain = kernels.dora_norm(p.weight, p.lora_a, p.lora_b, p.scaling, p.magnitude)
        outer = p.echo if p.echo is not None and p.echo.site == "output" else None
        y, z = kernels.linear_product(
            rows,
            p.weight,
            part,
            p.lora_b,
            bias=p.bias,
            gain=gain,
            delta=None if outer is None else outer.delta,
            mask=None if outer is None else outer.mask,
            dropout=dropout,
            store_z=need_z,
            shape=shape,
        )
        found.append(ForwardResult(y, None, z, norm, gain))
    return s, found


def _small(kernels: Kernels, rows: torch.Tensor, p: Projection) -> bool:
    """Whether `small_forward` computes all that this projection's forward pass has."""
    return p.magnitude is None and p.echo is None and kernels.small(rows, p.weight, len(p.lora_a))


def _all_small(kernels: Kernels, dy: torch.Tensor, p: Projection, gain: Maybe, needs: Sequence[bool]) -> bool:
    """The same of its backward pass, where x needs a gradient; p is what was saved of it."""
    _, bias, lora_a, lora_b, *_ = needs
    return gain is None and lora_a and lora_b and not bias and _small(kernels, as_rows(dy), p)


def _flat_gradients(dx: Maybe, gradients: Sequence[Sequence[Maybe]]) -> tuple[Maybe, ...]:
    """As the Function returns them."""
    return dx, *[None] * (_FIXED - 1), *(gradient for own in gradients for gradient in own)


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
        sum(p.lora_a.shape[0] for p in projections) <= load(backend).max_rank
        and len(masks) <= 1
        and not any(weight.requires_grad for weight in weights)
        and math.prod(x.shape[:-1]) > 0
        and not traced()
    )
    if not together:
        return tuple(apply(backend, x, weight, p, dropout) for p, weight in zip(projections, weights, strict=True))
    fixed = [("output" if p.echo is None else p.echo.site, float(p.scaling)) for p in projections]
    tensors = [t for p, weight in zip(projections, weights, strict=True) for t in (weight, *_flatten(p)[1:])]
    return EchoLoRALinearGroupFunction.apply(x, dropout, backend, fixed, torch.is_grad_enabled(), *tensors)
