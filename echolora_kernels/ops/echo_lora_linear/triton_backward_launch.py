"""Launchers of the backward kernels of `echo_lora_linear`."""

from __future__ import annotations

import torch

from . import configs
from .configs import Tile
from .dropout import Dropout
from .kernels import AdapterGradients
from .launch import accumulator, device_of, dropout_constants, echo_arguments, input_precision, reduce_partials, run
from .rows import Rows, accumulator_dtype, one_sample
from .triton_backward import adapter_bwd_kernel, input_bwd_kernel, lora_a_bwd_kernel
from .triton_forward import shrink


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
        ds [n * T, r], lora_b [N, r], bias [N], gain [N], delta [n, N].
    """
    device, rank = device_of(dy), lora_b.shape[1]
    d_out = dy.shape[2]
    ds_apart = need_ds and rank > configs.ONE_PASS_RANK
    result = AdapterGradients()
    if ds_apart:
        result.ds = shrink(dy, lora_b.t(), scaling, dropout=Dropout(), gain=gain).to(accumulator_dtype(dy.dtype))
    need_ds = need_ds and not ds_apart
    if not (need_ds or need_lora_b or need_bias or need_gain or need_delta):
        return result

    if not need_delta:
        dy = one_sample(dy)
    rows = Rows.of(dy)
    block_r = configs.rank_block(rank)
    tile = tile or configs.adapter_bwd_tile(block_r, dy.dtype, device.arch)
    tiles_per_sample = -(-dy.shape[1] // tile.inner)
    row_tiles = dy.shape[0] * tiles_per_sample
    col_tiles = -(-d_out // tile.rows)
    splits = splits or configs.reduction_splits(col_tiles, row_tiles, device.processors)
    per_split = configs.per_split(row_tiles, 1, splits)
    splits = max(1, -(-row_tiles // per_split))

    def partial(needed: bool, *shape: int) -> torch.Tensor | None:
        return dy.new_empty(shape, dtype=accumulator_dtype(dy.dtype)) if needed else None

    ds = partial(need_ds, col_tiles, rows.total, rank)
    db = partial(need_lora_b, splits, d_out, rank)
    dbias, dgain = partial(need_bias, splits, d_out), partial(need_gain, splits, d_out)
    ddelta = partial(need_delta, dy.shape[0], tiles_per_sample, d_out)
    mask_strides = (0, 0) if mask is None else mask.stride()
    run(
        adapter_bwd_kernel,
        (col_tiles, splits),
        dy.device,
        tile,
        dy=dy,
        b=lora_b,
        s=s,
        gain=gain,
        z=z,
        mask=mask,
        ds=ds,
        db=db,
        dbias=dbias,
        dgain=dgain,
        ddelta=ddelta,
        M=rows.total,
        T=rows.per_sample,
        N=d_out,
        R=rank,
        N_TILES=row_tiles,
        TILES_PER_SPLIT=per_split,
        stride_s=0 if s is None else s.stride(0),
        stride_dy_n=dy.stride(0),
        stride_dy_t=dy.stride(1),
        stride_dy_d=dy.stride(2),
        stride_b_n=lora_b.stride(0),
        stride_b_r=lora_b.stride(1),
        stride_mask_n=mask_strides[0],
        stride_mask_t=mask_strides[1],
        SCALING=float(scaling),
        HAS_GAIN=gain is not None,
        NEED_DS=need_ds,
        NEED_DB=need_lora_b,
        NEED_DBIAS=need_bias,
        NEED_DGAIN=need_gain,
        NEED_DDELTA=need_delta,
        STAGES=tile.num_stages,
        BLOCK_M=tile.inner,
        BLOCK_N=tile.rows,
        BLOCK_R=block_r,
        ACC=accumulator(dy.dtype),
        PRECISION=input_precision(dy.dtype),
    )
    if ds is not None:
        result.ds = reduce_partials(ds)
    result.lora_b = None if db is None else reduce_partials(db)
    result.bias = None if dbias is None else reduce_partials(dbias)
    result.gain = None if dgain is None else reduce_partials(dgain)
    result.delta = None if ddelta is None else reduce_partials(ddelta.transpose(0, 1))
    return result


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
    rows, device = Rows.of(x), device_of(x)
    width, rank = x.shape[2], ds.shape[1]
    ds = ds.to(x.dtype)
    block_r = configs.rank_block(rank)
    tile = tile or configs.lora_a_bwd_tile(block_r, x.dtype, device.arch)
    col_tiles = -(-width // tile.cols)
    steps = -(-rows.total // tile.inner)
    splits = splits or configs.reduction_splits(col_tiles, steps, device.processors)
    per_split = configs.per_split(rows.total, tile.inner, splits)
    splits = max(1, -(-rows.total // per_split))
    da = x.new_empty((splits, rank, width), dtype=accumulator_dtype(x.dtype))
    run(
        lora_a_bwd_kernel,
        (col_tiles, splits),
        x.device,
        tile,
        x=x,
        ds=ds,
        **echo_arguments(delta, mask),
        seed=dropout.seed,
        da=da,
        M=rows.total,
        T=rows.per_sample,
        K=width,
        R=rank,
        M_PER_SPLIT=per_split,
        stride_x_n=x.stride(0),
        stride_x_t=x.stride(1),
        stride_x_k=x.stride(2),
        **dropout_constants(dropout),
        HAS_DELTA=delta is not None,
        BLOCK_M=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        ACC=accumulator(x.dtype),
        PRECISION=input_precision(x.dtype),
    )
    return reduce_partials(da).to(dtype)


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
    rows = Rows.of(dy)
    d_out, d_in = weight.shape
    rank = 0 if lora_a is None else lora_a.shape[0]
    block_r = configs.rank_step(max(rank, 1))
    two_products = gain is not None and dropout.on_base
    load = configs.input_load(rank, dropout.p > 0, two_products, added=not contract)
    tile = tile or configs.matmul_tile(rows.total, d_in, dy.dtype, device_of(dy), load)
    dx = dy.new_empty((rows.total, d_in)) if base is None else base
    run(
        input_bwd_kernel,
        (-(-rows.total // tile.rows) * -(-d_in // tile.cols),),
        dy.device,
        tile,
        dy=dy,
        w=weight,
        ds=ds,
        a=lora_a,
        gain=gain,
        seed=dropout.seed,
        dx=dx,
        M=rows.total,
        T=rows.per_sample,
        K=d_in,
        N=d_out if contract else 0,
        R=rank,
        stride_dy_n=dy.stride(0),
        stride_dy_t=dy.stride(1),
        stride_dy_d=dy.stride(2),
        stride_w_n=weight.stride(0),
        stride_w_k=weight.stride(1),
        stride_a_r=0 if lora_a is None else lora_a.stride(0),
        stride_a_k=0 if lora_a is None else lora_a.stride(1),
        **dropout_constants(dropout),
        HAS_BASE=base is not None,
        HAS_GAIN=gain is not None,
        DORA_DROPOUT=two_products,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(dy.dtype),
        PRECISION=input_precision(dy.dtype),
    )
    return dx
