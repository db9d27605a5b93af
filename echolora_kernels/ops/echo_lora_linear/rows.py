"""A tensor [..., width] as rows, and the dtype that sums over them are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """How many rows a [n, T, width] tensor has, and how many belong to one sample."""

    total: int
    per_sample: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows:
        return cls(tensor.shape[0] * tensor.shape[1], max(1, tensor.shape[1]))


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


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
