"""The two large products for Hopper and newer: tiles come through tensor descriptors (TMA).

Same results and arguments as `triton_forward_launch.linear` and `triton_backward_launch.input_backward`. With a persistent
tile, each program walks over many output tiles; else each has one, and two of them share a processor. What is thin
(S, A, B, vectors) comes through pointers: any rank, any adapter dtype.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .configs import Device, Tile
from .dropout import Dropout
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
    strides,
)
from .rows import one_sample
from .triton_blocks import VARYING, add_low_rank, add_outside_gain, keep_mask, swizzled_tile


@triton.jit
def _linear_tile(
    i_tile,
    x,
    w,
    y,
    s,
    b,
    bias,
    gain,
    delta,
    mask,
    z,
    M,
    T,
    K,
    N,
    R,
    stride_s,
    stride_b_n,
    stride_b_r,
    stride_bias,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_row_tiles, n_col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    i_m, i_n = swizzled_tile(i_tile, n_row_tiles, n_col_tiles, GROUP)
    i_row, i_col = i_m * BLOCK_M, i_n * BLOCK_N
    o_m, o_n = i_row + tl.arange(0, BLOCK_M), i_col + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N

    b_z = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if not STORE_Z:  # while the first tiles of x and W0 are on their way
        b_z = add_low_rank(
            b_z, s, b, o_m, o_n, m_m, m_n, R, stride_s, stride_b_n, stride_b_r, RANK_STEPS, BLOCK_R, ACC, PRECISION
        )  # fmt: skip
    for i_k in range(0, K, BLOCK_K):
        b_x, b_w = x.load([i_row, i_k]), w.load([i_col, i_k])
        b_z = tl.dot(b_x, b_w.T, b_z, input_precision=PRECISION, out_dtype=ACC)
    if STORE_Z:
        o_z = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(z + o_z, b_z.to(z.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
        b_z = add_low_rank(
            b_z, s, b, o_m, o_n, m_m, m_n, R, stride_s, stride_b_n, stride_b_r, RANK_STEPS, BLOCK_R, ACC, PRECISION
        )  # fmt: skip
    if HAS_GAIN:
        b_z *= tl.load(gain + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    b_z = add_outside_gain(
        b_z, bias, delta, mask, o_m, o_n, m_m, m_n, T, stride_bias, stride_delta_n, stride_delta_d,
        stride_mask_n, stride_mask_t, HAS_BIAS, HAS_DELTA, ACC,
    )  # fmt: skip
    y.store([i_row, i_col], b_z.to(y.dtype))


@triton.jit(do_not_specialize=VARYING)
def linear_descriptor_fwd_kernel(
    x,
    w,
    y,
    s,
    b,
    bias,
    gain,
    delta,
    mask,
    z,
    M,
    T,
    K,
    N,
    R,
    stride_s,
    stride_b_n,
    stride_b_r,
    stride_bias,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    PROGRAMS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if PROGRAMS:
        for i_tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), PROGRAMS):
            _linear_tile(
                i_tile, x, w, y, s, b, bias, gain, delta, mask, z, M, T, K, N, R, stride_s, stride_b_n, stride_b_r,
                stride_bias, stride_delta_n, stride_delta_d, stride_mask_n, stride_mask_t, HAS_GAIN, HAS_BIAS, HAS_DELTA,
                STORE_Z, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP, ACC, PRECISION,
            )  # fmt: skip
    else:
        _linear_tile(
            tl.program_id(0), x, w, y, s, b, bias, gain, delta, mask, z, M, T, K, N, R, stride_s, stride_b_n,
            stride_b_r, stride_bias, stride_delta_n, stride_delta_d, stride_mask_n, stride_mask_t, HAS_GAIN, HAS_BIAS,
            HAS_DELTA, STORE_Z, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP, ACC, PRECISION,
        )  # fmt: skip


@triton.jit
def _input_tile(
    i_tile,
    dy,
    w,
    dx,
    ds,
    a,
    seed,
    M,
    K,
    N,
    R,
    stride_a_r,
    stride_a_k,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_row_tiles, n_col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    i_m, i_col = swizzled_tile(i_tile, n_row_tiles, n_col_tiles, GROUP)
    i_row, i_k = i_m * BLOCK_M, i_col * BLOCK_K
    o_m, o_k = i_row + tl.arange(0, BLOCK_M), i_k + tl.arange(0, BLOCK_K)

    b_dx = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    # A^T has the place that B has in the forward pass
    b_dx = add_low_rank(
        b_dx, ds, a, o_m, o_k, o_m < M, o_k < K, R, R, stride_a_k, stride_a_r, RANK_STEPS, BLOCK_R, ACC, PRECISION
    )  # fmt: skip
    if DROPOUT:
        m_keep = keep_mask(tl.load(seed), o_m, i_k, K, DROP_BELOW, BLOCK_M, BLOCK_K)
        b_dx = tl.where(m_keep, b_dx * KEEP_SCALE, 0.0)
    for i_n in range(0, N, BLOCK_N):
        b_dy, b_w = dy.load([i_row, i_n]), w.load([i_n, i_k])
        b_dx = tl.dot(b_dy, b_w, b_dx, input_precision=PRECISION, out_dtype=ACC)
    dx.store([i_row, i_k], b_dx.to(dx.dtype))


@triton.jit(do_not_specialize=VARYING)
def input_descriptor_bwd_kernel(
    dy,
    w,
    dx,
    ds,
    a,
    seed,
    M,
    K,
    N,
    R,
    stride_a_r,
    stride_a_k,
    PROGRAMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if PROGRAMS:
        for i_tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K), PROGRAMS):
            _input_tile(
                i_tile, dy, w, dx, ds, a, seed, M, K, N, R, stride_a_r, stride_a_k, DROPOUT, DROP_BELOW, KEEP_SCALE,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP, ACC, PRECISION,
            )  # fmt: skip
    else:
        _input_tile(
            tl.program_id(0), dy, w, dx, ds, a, seed, M, K, N, R, stride_a_r, stride_a_k, DROPOUT, DROP_BELOW,
            KEEP_SCALE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, GROUP, ACC, PRECISION,
        )  # fmt: skip


def describable(*matrices: torch.Tensor) -> bool:
    """Whether tensor descriptors can address these: [rows, width], unit stride, 16-byte rows and base, not empty."""
    return all(
        matrix.numel() > 0
        and matrix.stride(-1) == 1
        and matrix.stride(-2) * matrix.element_size() % 16 == 0
        and matrix.stride(-2) >= matrix.shape[-1]
        and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )


def linear_by_descriptors(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    store_z: bool = False,
    shape: tuple[int, ...] | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """F2 by tensor descriptors: ``y = g z + bias + mask delta`` with ``z = x W0^T + S B^T``.

    Args:
        x: [n, T, K] that merges into one [rows, K] matrix; it and weight [N, K] `describable`.
        the others: as in `triton_forward_launch.linear`.
    """
    total, d_out = x.shape[0] * x.shape[1], weight.shape[0]
    plan = _linear_plan(
        kind(x), kind(weight), s.stride(), kind(lora_b), strides(bias), gain is not None, strides(delta), strides(mask),
        store_z, tile, device_of(x), input_precision(x.dtype),
    )  # fmt: skip
    y = x.new_empty(shape or (total, d_out))
    z = x.new_empty((total, d_out)) if store_z else None
    plan.run(
        x.device, x=one_sample(x)[0], w=weight, y=y.view(total, d_out), s=s, b=lora_b, bias=bias, gain=gain,
        delta=delta, mask=mask, z=z,
    )  # fmt: skip
    return y, z


@planned
def _linear_plan(
    x: Kind,
    weight: Kind,
    s: tuple[int, ...],
    lora_b: Kind,
    bias: tuple[int, ...] | None,
    has_gain: bool,
    delta: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    store_z: bool,
    tile: Tile | None,
    device: Device,
    precision: str,
) -> Launch:
    """F2's launch; x, weight and lora_b are kinds, the other tensors strides."""
    (samples, length, _), _, dtype = x
    (d_out, d_in), _, _ = weight
    (_, rank), b_strides, _ = lora_b
    rows, block_r = samples * length, configs.rank_step(rank)
    rich = has_gain or delta is not None
    tile = tile or configs.descriptor_tile(rows, d_out, rank, dtype, device, rich=rich)
    tiles = -(-rows // tile.rows) * -(-d_out // tile.cols)
    programs = min(device.processors, tiles) if tile.persistent else tiles
    return Launch(
        linear_descriptor_fwd_kernel,
        (programs,),
        tile,
        {"x": [tile.rows, tile.inner], "w": [tile.cols, tile.inner], "y": [tile.rows, tile.cols]},
        M=rows,
        T=max(1, length),
        K=d_in,
        N=d_out,
        R=rank,
        stride_s=s[0],
        **named_strides("b", "nr", b_strides),
        stride_bias=0 if bias is None else bias[0],
        **echo_strides(delta, mask),
        PROGRAMS=programs if tile.persistent else 0,
        HAS_GAIN=has_gain,
        HAS_BIAS=bias is not None,
        HAS_DELTA=delta is not None,
        STORE_Z=store_z,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )


def input_by_descriptors(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    *,
    dropout: Dropout,
    tile: Tile | None = None,
) -> torch.Tensor:
    """B3 without a gain by tensor descriptors: ``dX = dY W0 + drop'(dS A)``.

    Args:
        dy: [n, T, N] that merges into one [rows, N] matrix; it and weight [N, K] `describable`.
        the others: as in `triton_backward_launch.input_backward`.
    """
    plan = _input_plan(kind(dy), kind(weight), kind(lora_a), dropout.p, tile, device_of(dy), input_precision(dy.dtype))
    dx = dy.new_empty((dy.shape[0] * dy.shape[1], weight.shape[1]))
    plan.run(dy.device, dy=one_sample(dy)[0], w=weight, dx=dx, ds=ds, a=lora_a, seed=dropout.seed)
    return dx


@planned
def _input_plan(
    dy: Kind, weight: Kind, lora_a: Kind, dropout_p: float, tile: Tile | None, device: Device, precision: str
) -> Launch:
    """B3's launch."""
    (samples, length, _), _, dtype = dy
    (d_out, d_in), _, _ = weight
    (rank, _), a_strides, _ = lora_a
    rows, block_r = samples * length, configs.rank_step(rank)
    tile = tile or configs.descriptor_tile(rows, d_in, rank, dtype, device, rich=dropout_p > 0)
    tiles = -(-rows // tile.rows) * -(-d_in // tile.cols)
    programs = min(device.processors, tiles) if tile.persistent else tiles
    return Launch(
        input_descriptor_bwd_kernel,
        (programs,),
        tile,
        {"dy": [tile.rows, tile.inner], "w": [tile.inner, tile.cols], "dx": [tile.rows, tile.cols]},
        M=rows,
        K=d_in,
        N=d_out,
        R=rank,
        **named_strides("a", "rk", a_strides),
        PROGRAMS=programs if tile.persistent else 0,
        **dropout_constants(dropout_p),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.inner,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
