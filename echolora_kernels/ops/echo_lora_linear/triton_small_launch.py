"""Small layers, which a GPU is done with before the host has launched what others take: the fewest launches."""

from __future__ import annotations

import torch

from . import candidates, configs
from .configs import Device
from .dropout import Dropout
from .launch import (
    Kind,
    Launch,
    accumulator,
    device_of,
    dropout_constants,
    dtype_name,
    input_precision,
    kind,
    named_strides,
    planned,
    strides,
)
from .rows import add_product, flat
from .triton_backward_launch import input_backward
from .triton_forward_launch import shrink
from .triton_products import input_product, linear_product
from .triton_small import small_adapter_bwd_kernel, small_fwd_kernel, small_input_bwd_kernel


def small_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None,
    dropout: Dropout,
    shape: tuple[int, ...],
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """F1 and F2, in one launch where that is no slower on the GPU either; see `Kernels`."""
    if not _in_one(x, weight):
        s = shrink(x, lora_a, scaling, dropout=dropout, out=s, splits=1)
        y, _ = linear_product(
            x, weight, s, lora_b, bias=bias, gain=None, delta=None, mask=None, dropout=dropout, store_z=False,
            shape=shape,
        )  # fmt: skip
        return s, y
    if s is None:
        s = x.new_empty((x.shape[0] * x.shape[1], lora_a.shape[0]))
    plan = _forward_plan(
        kind(x), kind(weight), kind(lora_a), lora_b.stride(), strides(bias), s.stride(0), float(scaling), dropout.p,
        device_of(x), input_precision(x.dtype),
    )  # fmt: skip
    y = x.new_empty(shape)
    plan.run(x.device, x=x, w=weight, a=lora_a, b=lora_b, bias=bias, seed=dropout.seed, s=s, y=y)
    return s, y


@planned
def _forward_plan(
    x: Kind,
    weight: Kind,
    lora_a: Kind,
    lora_b: tuple[int, ...],
    bias: tuple[int, ...] | None,
    stride_s: int,
    scaling: float,
    dropout_p: float,
    device: Device,
    precision: str,
) -> Launch:
    """The forward launch; x, weight and lora_a are kinds, the others strides."""
    (samples, length, d_in), x_strides, dtype = x
    (d_out, _), w_strides, _ = weight
    (rank, _), a_strides, _ = lora_a
    rows, tile = samples * length, configs.small_tile(dtype, device.arch)
    return Launch(
        small_fwd_kernel,
        (-(-rows // tile.rows) * -(-d_out // tile.cols),),
        tile,
        M=rows,
        T=max(1, length),
        K=d_in,
        N=d_out,
        R=rank,
        **named_strides("x", "ntk", x_strides),
        **named_strides("w", "nk", w_strides),
        **named_strides("a", "rk", a_strides),
        **named_strides("b", "nr", lora_b),
        stride_bias=0 if bias is None else bias[0],
        stride_s=stride_s,
        SCALING=scaling,
        **dropout_constants(dropout_p),
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=configs.rank_block(rank),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )


def small_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    dropout: Dropout,
    base: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dS and B3, in one launch where F1 and F2 are, then dB and dA in one; see `Kernels`."""
    if _in_one(dy, weight):
        dx, ds = _input_backward(dy, weight, lora_a, lora_b, scaling, dropout, base)
    else:
        ds = shrink(dy, lora_b.t(), scaling, dropout=Dropout(), splits=1)
        if base is None:
            dx = input_product(dy, weight, ds, lora_a, dropout=dropout, gain=None)
        else:  # `group_input_product` asks for the fastest way of each: no kernel of those that win adds to anything
            input_backward(dy, weight, ds, lora_a, dropout=dropout, contract=False, base=base)
            dx = add_product(base, flat(dy), weight, None)
    plan = _adapter_plan(
        kind(dy), lora_a.shape[0], kind(x), s.stride(0), dropout.p, device_of(x), input_precision(x.dtype)
    )  # fmt: skip
    da, db = lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)
    plan.run(dy.device, dy=dy, x=x, s=s, ds=ds, seed=dropout.seed, db=db, da=da)
    return dx, da, db


def _input_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout: Dropout,
    base: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dX and dS in one launch."""
    plan = _input_plan(
        kind(dy), kind(lora_a), lora_b.stride(), kind(weight), base is not None, float(scaling), dropout.p,
        device_of(dy), input_precision(dy.dtype),
    )  # fmt: skip
    rows = dy.shape[0] * dy.shape[1]
    ds = dy.new_empty((rows, lora_a.shape[0]))
    dx = dy.new_empty((rows, weight.shape[1])) if base is None else base
    plan.run(dy.device, dy=dy, w=weight, a=lora_a, b=lora_b, seed=dropout.seed, ds=ds, dx=dx)
    return dx, ds


@planned
def _input_plan(
    dy: Kind,
    lora_a: Kind,
    lora_b: tuple[int, ...],
    weight: Kind,
    has_base: bool,
    scaling: float,
    dropout_p: float,
    device: Device,
    precision: str,
) -> Launch:
    """The launch of dX and dS."""
    (samples, length, d_out), dy_strides, dtype = dy
    (_, d_in), w_strides, _ = weight
    (rank, _), a_strides, _ = lora_a
    rows, tile = samples * length, configs.small_tile(dtype, device.arch)
    return Launch(
        small_input_bwd_kernel,
        (-(-rows // tile.rows) * -(-d_in // tile.cols),),
        tile,
        M=rows,
        T=max(1, length),
        K=d_in,
        N=d_out,
        R=rank,
        **named_strides("dy", "ntd", dy_strides),
        **named_strides("w", "nk", w_strides),
        **named_strides("a", "rk", a_strides),
        **named_strides("b", "nr", lora_b),
        SCALING=scaling,
        **dropout_constants(dropout_p),
        HAS_BASE=has_base,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=configs.rank_block(rank),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )


@planned
def _adapter_plan(
    dy: Kind,
    rank: int,
    x: Kind,
    stride_s: int,
    dropout_p: float,
    device: Device,
    precision: str,
) -> Launch:
    """The launch of dB and dA."""
    (samples, length, d_out), dy_strides, dtype = dy
    (_, _, d_in), x_strides, _ = x
    tile = configs.small_sum_tile(dtype, device.arch)
    n_tiles = -(-d_out // tile.cols)
    return Launch(
        small_adapter_bwd_kernel,
        (n_tiles + -(-d_in // tile.cols),),
        tile,
        M=samples * length,
        T=max(1, length),
        K=d_in,
        N=d_out,
        R=rank,
        N_TILES=n_tiles,
        **named_strides("dy", "ntd", dy_strides),
        **named_strides("x", "ntk", x_strides),
        stride_s=stride_s,
        **dropout_constants(dropout_p),
        BLOCK=tile.cols,
        BLOCK_M=tile.inner,
        BLOCK_R=configs.rank_block(rank),
        ACC=accumulator(dtype),
        PRECISION=precision,
    )


def small(rows: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
    """Whether a LoRA layer of these sizes is small; see `Kernels`."""
    m, (n, k) = rows.shape[0] * rows.shape[1], weight.shape
    return _is_small(m, n, k, rank, rows.dtype, device_of(rows).arch) and not candidates.insisted()


@planned
def _is_small(m: int, n: int, k: int, rank: int, dtype: torch.dtype, arch: str) -> bool:
    if arch == "cpu" or m > configs.SMALL_ROWS or rank > configs.SMALL_RANK:
        return False
    few = m >= configs.FEW_LAUNCHES_ROWS and candidates.brief(m, n, k, dtype_name(dtype), configs.FEW_LAUNCHES)
    return few or _is_tiny(m, n, k, dtype)


def _in_one(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether one launch is enough for a small layer's product and its low-rank term."""
    return _is_tiny(rows.shape[0] * rows.shape[1], *weight.shape, rows.dtype)


@planned
def _is_tiny(m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    return candidates.brief(m, n, k, dtype_name(dtype))
