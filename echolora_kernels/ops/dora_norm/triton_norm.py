"""D0: row norm of W0 + s B A, tile by tile, and the gain that follows from it; no [d_out, d_in] temporary.

Several programs share one row: each writes the sum of its squares, a second kernel adds those in a fixed order. The
sum W0 + s B A is formed before it is squared: |w|^2 + 2 s w.u + s^2 |u|^2 would lose what little a row may be left with.
"""

# ruff: noqa: N803, SIM300  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..echo_lora_linear import configs
from ..echo_lora_linear.configs import Device, Tile
from ..echo_lora_linear.launch import Kind, Launch, accumulator, device_of, kind, planned, strides
from ..echo_lora_linear.rows import accumulator_dtype


@triton.jit
def dora_squares_fwd_kernel(
    w,
    a,
    b,
    squares,
    N,
    K,
    R,
    K_PER_SPLIT,
    stride_w_n,
    stride_w_k,
    stride_a_r,
    stride_a_k,
    stride_b_n,
    stride_b_r,
    SCALING: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_split = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_n = o_n.to(tl.int64)
    p_w = w + o_n * stride_w_n
    p_b = b + o_n * stride_b_n

    b_squares = tl.zeros([BLOCK_N], ACC)
    i_begin = i_split * K_PER_SPLIT
    # an explicit num_stages also prefetches W0, which feeds no dot
    for i_k in tl.range(i_begin, min(i_begin + K_PER_SPLIT, K), BLOCK_K, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_k = o_k.to(tl.int64)
        b_w = tl.load(p_w[:, None] + o_k[None, :] * stride_w_k, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_update = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for i_step in tl.range(0, RANK_STEPS, num_stages=1):
            o_r = i_step * BLOCK_R + tl.arange(0, BLOCK_R)
            m_r = o_r < R
            o_r = o_r.to(tl.int64)
            b_b = tl.load(p_b[:, None] + o_r[None, :] * stride_b_r, mask=m_n[:, None] & m_r[None, :], other=0.0)
            p_a = a + o_r[:, None] * stride_a_r + o_k[None, :] * stride_a_k
            b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
            if ACC == tl.float64:
                b_a, b_b = b_a.to(ACC), b_b.to(ACC)
            b_update = tl.dot(b_b, b_a, b_update, input_precision=PRECISION, out_dtype=ACC)
        b_sum = b_w.to(ACC) + b_update * SCALING
        b_squares += tl.sum(b_sum * b_sum, 1)
    tl.store(squares + i_split.to(tl.int64) * N + o_n, b_squares, mask=m_n)


@triton.jit
def dora_gain_fwd_kernel(
    squares,
    magnitude,
    norm,
    gain,
    N,
    SPLITS,
    stride_magnitude,
    FLOOR: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_split = tl.arange(0, BLOCK_SPLITS)
    m_n = o_n < N
    o_n = o_n.to(tl.int64)
    p_squares = squares + o_split[:, None].to(tl.int64) * N + o_n[None, :]
    b_squares = tl.load(p_squares, mask=(o_split < SPLITS)[:, None] & m_n[None, :], other=0.0)
    b_norm = tl.sqrt(tl.sum(b_squares, 0))
    tl.store(norm + o_n, b_norm, mask=m_n)
    if HAS_MAGNITUDE:
        b_magnitude = tl.load(magnitude + o_n * stride_magnitude, mask=m_n, other=0.0).to(b_norm.dtype)
        # a row whose norm is zero has nothing to scale; its gain stays finite
        tl.store(gain + o_n, b_magnitude / tl.maximum(b_norm, FLOOR), mask=m_n)


@torch.no_grad()
def dora_norm(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``norm = || W0 + s B A ||_row`` and ``gain = magnitude / norm``, as constants.

    Args:
        weight: W0, [N, K]. lora_a: A, [r, K]. lora_b: B, [N, r]. Any strides; A and B of one floating dtype.
        scaling: s.
        magnitude: [N] or None.
        tile, splits: launch config, and how many programs share one row, at most `configs.MAX_NORM_SPLITS`; None
            chooses.

    Returns:
        norm, and the gain where a magnitude is given: [N], float32, or float64 where an argument is.
    """
    wide = accumulator_dtype(torch.promote_types(weight.dtype, lora_a.dtype))
    squares_plan, gain_plan, splits = _norm_plans(
        kind(weight), kind(lora_a), kind(lora_b), strides(magnitude), float(scaling), tile, splits, device_of(weight)
    )
    squares = weight.new_empty((splits, weight.shape[0]), dtype=wide)
    squares_plan.run(weight.device, w=weight, a=lora_a, b=lora_b, squares=squares)
    norm = squares.new_empty((weight.shape[0],))
    gain = None if magnitude is None else squares.new_empty((weight.shape[0],))
    gain_plan.run(weight.device, squares=squares, magnitude=magnitude, norm=norm, gain=gain)
    return norm, gain


@planned
def _norm_plans(
    weight: Kind,
    lora_a: Kind,
    lora_b: Kind,
    magnitude: tuple[int, ...] | None,
    scaling: float,
    tile: Tile | None,
    splits: int | None,
    device: Device,
) -> tuple[Launch, Launch, int]:
    """The two launches, and how many programs share one row; magnitude is its strides."""
    (d_out, d_in), w_strides, w_dtype = weight
    (rank, _), a_strides, a_dtype = lora_a
    _, b_strides, _ = lora_b
    block_r = min(configs.MAX_NORM_RANK_STEP, configs.rank_block(rank))
    wide = torch.promote_types(w_dtype, a_dtype)
    tile = tile or configs.dora_norm_tile(wide, device.arch)
    splits = splits or configs.dora_norm_splits(tile, d_out, d_in, device.processors)
    per_split = configs.per_split(d_in, tile.inner, splits)
    splits = max(1, -(-d_in // per_split))
    squares = Launch(
        dora_squares_fwd_kernel,
        (-(-d_out // tile.rows), splits),
        tile,
        N=d_out,
        K=d_in,
        R=rank,
        K_PER_SPLIT=per_split,
        stride_w_n=w_strides[0],
        stride_w_k=w_strides[1],
        stride_a_r=a_strides[0],
        stride_a_k=a_strides[1],
        stride_b_n=b_strides[0],
        stride_b_r=b_strides[1],
        SCALING=scaling,
        STAGES=tile.num_stages,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        ACC=accumulator(wide),
        # on matrix units, yet as exact as float32 allows; others know no such way
        PRECISION="ieee" if a_dtype != torch.float32 or torch.version.hip else "tf32x3",
    )
    gain = Launch(
        dora_gain_fwd_kernel,
        (-(-d_out // tile.rows),),
        tile,
        N=d_out,
        SPLITS=splits,
        stride_magnitude=0 if magnitude is None else magnitude[0],
        FLOOR=torch.finfo(accumulator_dtype(wide)).tiny,
        HAS_MAGNITUDE=magnitude is not None,
        BLOCK_N=tile.rows,
        BLOCK_SPLITS=configs.MAX_NORM_SPLITS,
    )
    return squares, gain, splits
