"""Launchers of the backward kernels of `echo_lora_linear`."""

from __future__ import annotations

import torch

from . import configs
from .configs import Device, Tile
from .dropout import Dropout
from .kernels import AdapterGradients
from .launch import (
    Kind,
    Launch,
    accumulator,
    device_of,
    dropout_constants,
    echo_strides,
    input_precision,
    kind,
    named_strides,
    planned,
    reduce_partials,
    strides,
)
from .rows import accumulator_dtype, one_sample
from .triton_backward import adapter_bwd_kernel, input_bwd_kernel, lora_a_bwd_kernel
from .triton_forward_launch import shrink


def adapter_backward(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    gain: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    need_ds: bool = False,
    need_lora_b: bool = False,
    need_bias: bool = False,
    need_gain: bool = False,
    need_delta: bool = False,
    tile: Tile | None = None,
    splits: int | None = None,
) -> AdapterGradients:
    """B1: everything that is a sum over dY, in one pass over it.

    A rank above `configs.ONE_PASS_RANK` reads dY a second time for dS: its partial sums would be larger than dY.

    Args:
        dy: [n, T, N], any strides, also expanded ones; never written.
        s: what `shrink` returned; for need_lora_b and need_gain. lora_b: [N, r]. scaling: s of the formula.
        gain, z: DoRA's factor [N] and what `linear` returned beside y; z only for need_gain.
        mask: [n, T], for need_delta.
        need_*: which gradients.
        tile, splits: launch config, and how many programs share one sum over rows; None chooses.

    Returns:
        ds [n * T, r] in dy's dtype, lora_b [N, r], bias [N], gain [N], delta [n, N].
    """
    device, rank = device_of(dy), lora_b.shape[1]
    ds_apart = need_ds and rank > configs.ONE_PASS_RANK
    result = AdapterGradients()
    if ds_apart:
        result.ds = shrink(dy, lora_b.t(), scaling, dropout=Dropout(), gain=gain)
    need_ds = need_ds and not ds_apart
    if not (need_ds or need_lora_b or need_bias or need_gain or need_delta):
        return result

    if not need_delta:
        dy = one_sample(dy)
    plan, parts = _adapter_plan(
        kind(dy), strides(s), kind(lora_b), strides(mask), float(scaling), gain is not None,
        (need_ds, need_lora_b, need_bias, need_gain, need_delta), tile, splits, device, input_precision(dy.dtype),
    )  # fmt: skip
    wide = accumulator_dtype(dy.dtype)
    ds, db, dbias, dgain, ddelta = (None if shape is None else dy.new_empty(shape, dtype=wide) for shape in parts)
    plan.run(
        dy.device, dy=dy, b=lora_b, s=s, gain=gain, z=z, mask=mask, ds=ds, db=db, dbias=dbias, dgain=dgain,
        ddelta=ddelta,
    )  # fmt: skip
    if ds is not None:
        result.ds = reduce_partials(ds).to(dy.dtype)  # as plain torch has it, and as B2 and B3 want it
    result.lora_b = None if db is None else reduce_partials(db)
    result.bias = None if dbias is None else reduce_partials(dbias)
    result.gain = None if dgain is None else reduce_partials(dgain)
    result.delta = None if ddelta is None else reduce_partials(ddelta.transpose(0, 1))
    return result


@planned
def _adapter_plan(
    dy: Kind,
    s: tuple[int, ...] | None,
    lora_b: Kind,
    mask: tuple[int, ...] | None,
    scaling: float,
    has_gain: bool,
    needs: tuple[bool, ...],
    tile: Tile | None,
    splits: int | None,
    device: Device,
    precision: str,
) -> tuple[Launch, list[tuple[int, ...] | None]]:
    """B1's launch, and the shapes of its partial sums: ds, db, dbias, dgain and ddelta, None where not needed."""
    (samples, length, d_out), dy_strides, dtype = dy
    (_, rank), b_strides, _ = lora_b
    need_ds, need_lora_b, need_bias, need_gain, need_delta = needs
    rows, block_r = samples * length, configs.rank_block(rank)
    tile = tile or configs.adapter_bwd_tile(block_r, dtype, device.arch, with_z=need_gain)
    tiles_per_sample = -(-length // tile.inner)
    row_tiles = samples * tiles_per_sample
    col_tiles = -(-d_out // tile.rows)
    splits = splits or configs.reduction_splits(col_tiles, row_tiles, device.processors)
    per_split = configs.per_split(row_tiles, 1, splits)
    splits = max(1, -(-row_tiles // per_split))
    launch = Launch(
        adapter_bwd_kernel,
        (col_tiles, splits),
        tile,
        M=rows,
        T=max(1, length),
        N=d_out,
        R=rank,
        N_TILES=row_tiles,
        TILES_PER_SPLIT=per_split,
        stride_s=0 if s is None else s[0],
        **named_strides("dy", "ntd", dy_strides),
        **named_strides("b", "nr", b_strides),
        **named_strides("mask", "nt", mask),
        SCALING=scaling,
        HAS_GAIN=has_gain,
        NEED_DS=need_ds,
        NEED_DB=need_lora_b,
        NEED_DBIAS=need_bias,
        NEED_DGAIN=need_gain,
        NEED_DDELTA=need_delta,
        STAGES=tile.num_stages,
        BLOCK_M=tile.inner,
        BLOCK_N=tile.rows,
        BLOCK_R=block_r,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
    shapes = (
        (col_tiles, rows, rank),
        (splits, d_out, rank),
        (splits, d_out),
        (splits, d_out),
        (samples, tiles_per_sample, d_out),
    )
    return launch, [shape if need else None for shape, need in zip(shapes, needs, strict=True)]


def lora_a_backward(
    x: torch.Tensor,
    ds: torch.Tensor,
    *,
    dropout: Dropout,
    delta: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """B2: ``dA = dS^T (drop(x) + mask delta)``, dropout replayed from its seed.

    Args:
        x: [n, T, K], any strides. ds: [n * T, r], contiguous; rounded to x's dtype.
        dropout: as in the forward pass.
        delta, mask: the echo at the adapter's input, [n, K] and [n, T], or None.
        dtype: of the result.
        tile, splits: launch config, and how many programs share one sum over rows; None chooses.

    Returns:
        dA, [r, K].
    """
    plan, shape = _lora_a_plan(
        kind(x), ds.shape[1], strides(delta), strides(mask), dropout.p, tile, splits, device_of(x),
        input_precision(x.dtype),
    )  # fmt: skip
    da = x.new_empty(shape, dtype=accumulator_dtype(x.dtype))
    plan.run(x.device, x=x, ds=ds.to(x.dtype), delta=delta, mask=mask, seed=dropout.seed, da=da)
    return reduce_partials(da).to(dtype)


@planned
def _lora_a_plan(
    x: Kind,
    rank: int,
    delta: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    dropout_p: float,
    tile: Tile | None,
    splits: int | None,
    device: Device,
    precision: str,
) -> tuple[Launch, tuple[int, ...]]:
    """B2's launch, and the shape of its partial sums."""
    (samples, length, width), x_strides, dtype = x
    rows, block_r = samples * length, configs.rank_block(rank)
    tile = tile or configs.lora_a_bwd_tile(block_r, dtype, device.arch)
    col_tiles = -(-width // tile.cols)
    splits = splits or configs.reduction_splits(col_tiles, -(-rows // tile.inner), device.processors)
    per_split = configs.per_split(rows, tile.inner, splits)
    splits = max(1, -(-rows // per_split))
    launch = Launch(
        lora_a_bwd_kernel,
        (col_tiles, splits),
        tile,
        M=rows,
        T=max(1, length),
        K=width,
        R=rank,
        M_PER_SPLIT=per_split,
        **named_strides("x", "ntk", x_strides),
        **echo_strides(delta, mask),
        **dropout_constants(dropout_p),
        HAS_DELTA=delta is not None,
        BLOCK_M=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
    return launch, (splits, rank, width)


def input_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    *,
    dropout: Dropout,
    gain: torch.Tensor | None = None,
    contract: bool = True,
    base: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """B3: ``dX = (g * dY) W0 + drop'(dS A)``.

    With DoRA and exact dropout ``dX = dY W0 + drop'(((g - 1) * dY) W0 + dS A)``.

    Args:
        dy: [n, T, N], any strides; never written.
        weight: [N, K]. ds: [n * T, r], contiguous, in dy's dtype. lora_a: [r, K]. Both None: no dS A.
        dropout: as in the forward pass. gain: [N] or None.
        base: [n * T, K], contiguous, to add to, in place: the dX of other projections of the same input.
        contract: False leaves out the product with W0, for the vendor's GEMM to add.
        tile: launch config; None chooses.

    Returns:
        dX, [n * T, K], contiguous, in dy's dtype.
    """
    plan = _input_plan(
        kind(dy), kind(weight), None if lora_a is None else kind(lora_a), gain is not None, base is not None, contract,
        dropout.p, dropout.on_base, tile, device_of(dy), input_precision(dy.dtype),
    )  # fmt: skip
    dx = dy.new_empty((dy.shape[0] * dy.shape[1], weight.shape[1])) if base is None else base
    plan.run(dy.device, dy=dy, w=weight, ds=ds, a=lora_a, gain=gain, seed=dropout.seed, dx=dx)
    return dx


@planned
def _input_plan(
    dy: Kind,
    weight: Kind,
    lora_a: Kind | None,
    has_gain: bool,
    has_base: bool,
    contract: bool,
    dropout_p: float,
    dropout_on_base: bool,
    tile: Tile | None,
    device: Device,
    precision: str,
) -> Launch:
    """B3's launch."""
    (samples, length, _), dy_strides, dtype = dy
    (d_out, d_in), w_strides, _ = weight
    (rank, _), a_strides, _ = lora_a or ((0, 0), (0, 0), dtype)
    rows, block_r = samples * length, configs.rank_step(max(rank, 1), dtype)
    two_products = has_gain and dropout_on_base
    load = configs.input_load(rank, dropout_p > 0, two_products, added=not contract)
    tile = tile or configs.matmul_tile(rows, d_in, dtype, device, load)
    return Launch(
        input_bwd_kernel,
        (-(-rows // tile.rows) * -(-d_in // tile.cols),),
        tile,
        M=rows,
        T=max(1, length),
        K=d_in,
        N=d_out if contract else 0,
        R=rank,
        **named_strides("dy", "ntd", dy_strides),
        **named_strides("w", "nk", w_strides),
        **named_strides("a", "rk", a_strides),
        **dropout_constants(dropout_p),
        HAS_BASE=has_base,
        HAS_GAIN=has_gain,
        DORA_DROPOUT=two_products,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
