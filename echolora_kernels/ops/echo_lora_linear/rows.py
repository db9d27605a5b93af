"""A tensor [..., width] as rows, products of them by the vendor's GEMM, and the dtype that sums are kept in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., width] as [n, T, width]; a view, except for more than three dimensions that cannot be merged."""
    if tensor.ndim < 3:
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor if tensor.ndim == 3 else tensor.flatten(0, -3)


def one_sample(rows: torch.Tensor) -> torch.Tensor:
    """[n, T, width] as [1, n * T, width] where the strides allow it without a copy, else unchanged."""
    n, length, width = rows.shape
    if n > 1 and rows.stride(0) == length * rows.stride(1):
        return rows.as_strided((1, n * length, width), (0, rows.stride(1), rows.stride(2)))
    return rows


def flat(rows: torch.Tensor) -> torch.Tensor:
    """[n, T, width] as [n * T, width], copied only where the strides forbid a view."""
    if rows.is_contiguous():
        return rows.view(-1, rows.shape[2])
    return one_sample(rows).reshape(rows.shape[0] * rows.shape[1], rows.shape[2])


def add_product(
    to: torch.Tensor | None, dy: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor | None
) -> torch.Tensor:
    """to + (gain * dy) W0 by the vendor's GEMM, in place; the gain goes on the smaller of the two.

    Args:
        to: [..., K], contiguous, or None for a new one. dy: [..., N]. weight: [N, K]. gain: [N] or None.
    """
    if gain is not None and dy.numel() < weight.numel():
        dy = (dy * gain).to(dy.dtype)
    elif gain is not None:
        weight = (weight * gain.unsqueeze(1)).to(weight.dtype)
    with without_autocast(dy):
        if to is None:
            return torch.matmul(dy, weight)
        rows = to.flatten(0, -2)
        torch.addmm(rows, dy.reshape(len(rows), dy.shape[-1]), weight, out=rows)
    return to


def without_autocast(like: torch.Tensor) -> AbstractContextManager[None]:
    """Off where it is on for `like`'s device; a switch for nothing would take longer than a small product."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on that kind of device, where it is on."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def autocast_narrows(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for it; float64 is left alone."""
    return tensor.dtype != torch.float64 and autocast_dtype(tensor.device.type) is not None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
