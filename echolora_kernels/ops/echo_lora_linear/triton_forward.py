"""Forward kernels of `echo_lora_linear` and their launchers.

F1  S = s (drop(x) A^T + rank-space echo)             reads x once
F2  y = g (x W0^T + S B^T) + bias + mask Delta        reads x and W0 once, S and B add r columns to the contraction
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .configs import Tile
from .dropout import Dropout
from .launch import accumulator, device_of, dropout_constants, echo_arguments, input_precision, reduce_partials, run
from .rows import Rows, accumulator_dtype
from .triton_blocks import add_low_rank, add_outside_gain, dropped, row_offsets, swizzled_tile


@triton.jit
def shrink_fwd_kernel(
    x,
    a,
    gain,
    delta,
    mask,
    seed,
    s,
    M,
    T,
    K,
    R,
    K_PER_SPLIT,
    stride_x_n,
    stride_x_t,
    stride_x_k,
    stride_a_r,
    stride_a_k,
    stride_gain,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    SCALING: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    SITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_split = tl.program_id(1)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_r = o_m < M, o_r < R
    i_n = (o_m // T).to(tl.int64)
    p_x = x + row_offsets(o_m, T, stride_x_n, stride_x_t)
    p_a = a + o_r.to(tl.int64) * stride_a_r
    if SITE != "none":
        p_mask = mask + row_offsets(o_m, T, stride_mask_n, stride_mask_t)
        b_mask = tl.load(p_mask, mask=m_m, other=0).to(ACC)
        p_delta = delta + i_n * stride_delta_n
    if DROPOUT:
        seed_value = tl.load(seed)

    b_s = tl.zeros([BLOCK_M, BLOCK_R], ACC)
    i_begin = i_split * K_PER_SPLIT
    for i_k in range(i_begin, min(i_begin + K_PER_SPLIT, K), BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_k = o_k.to(tl.int64)
        m_x = m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_x[:, None] + o_k[None, :] * stride_x_k, mask=m_x, other=0.0)
        b_in = b_x
        if DROPOUT:
            b_in = dropped(b_x, seed_value, o_m, i_k, K, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK_K)
        if SITE == "adapter_input":
            b_delta = tl.load(p_delta[:, None] + o_k[None, :] * stride_delta_d, mask=m_x, other=0.0).to(ACC)
            b_in = b_in.to(ACC) + b_mask[:, None] * b_delta
        b_a = tl.load(p_a[None, :] + o_k[:, None] * stride_a_k, mask=m_k[:, None] & m_r[None, :], other=0.0)
        if HAS_GAIN:  # backward of DoRA: the contraction runs over outputs, each with its own gain
            b_a = b_a.to(ACC) * tl.load(gain + o_k * stride_gain, mask=m_k, other=0.0)[:, None]
        b_s = tl.dot(b_in.to(b_x.dtype), b_a.to(b_x.dtype), b_s, input_precision=PRECISION, out_dtype=ACC)

    if SITE == "rank" and i_split == 0:
        m_s = m_m[:, None] & m_r[None, :]
        b_delta = tl.load(p_delta[:, None] + o_r[None, :].to(tl.int64) * stride_delta_d, mask=m_s, other=0.0).to(ACC)
        b_s += b_mask[:, None] * b_delta
    p_s = s + (i_split.to(tl.int64) * M + o_m)[:, None] * R + o_r[None, :]
    tl.store(p_s, (b_s * SCALING).to(s.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


@triton.jit
def linear_fwd_kernel(
    x,
    w,
    s,
    b,
    bias,
    gain,
    delta,
    mask,
    seed,
    base,
    y,
    z,
    M,
    T,
    K,
    N,
    R,
    stride_x_n,
    stride_x_t,
    stride_x_k,
    stride_w_n,
    stride_w_k,
    stride_s,
    stride_b_n,
    stride_b_r,
    stride_bias,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    DORA_DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
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
    i_m, i_n = swizzled_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    p_x = x + row_offsets(o_m, T, stride_x_n, stride_x_t)
    p_w = w + o_n.to(tl.int64) * stride_w_n

    m_y = m_m[:, None] & m_n[None, :]
    o_y = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    b_y = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if HAS_BASE:  # K is 0 then: the base product is done
        b_y += tl.load(base + o_y, mask=m_y, other=0.0).to(ACC)
    if DORA_DROPOUT:
        b_z = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        seed_value = tl.load(seed)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_k = o_k.to(tl.int64)
        b_x = tl.load(p_x[:, None] + o_k[None, :] * stride_x_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w[None, :] + o_k[:, None] * stride_w_k, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION, out_dtype=ACC)
        if DORA_DROPOUT:
            b_dropped = dropped(b_x, seed_value, o_m, i_k, K, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK_K)
            b_z = tl.dot(b_dropped.to(b_x.dtype), b_w, b_z, input_precision=PRECISION, out_dtype=ACC)
    if DORA_DROPOUT:
        b_y -= b_z  # the frozen layer on x - drop(x), which no gain scales
    else:
        b_z = b_y

    if STORE_Z:
        tl.store(z + o_y, b_z.to(z.dtype.element_ty), mask=m_y)
    b_z = add_low_rank(
        b_z, s, b, o_m, o_n, m_m, m_n, R, stride_s, stride_b_n, stride_b_r, RANK_STEPS, BLOCK_R, ACC, PRECISION
    )  # fmt: skip
    if HAS_GAIN:
        b_z *= tl.load(gain + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    if DORA_DROPOUT:
        b_z += b_y
    b_z = add_outside_gain(
        b_z, bias, delta, mask, o_m, o_n, m_m, m_n, T, stride_bias, stride_delta_n, stride_delta_d,
        stride_mask_n, stride_mask_t, HAS_BIAS, HAS_DELTA, ACC,
    )  # fmt: skip
    tl.store(y + o_y, b_z.to(y.dtype.element_ty), mask=m_y)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float,
    *,
    dropout: Dropout,
    gain: torch.Tensor | None = None,
    site: str = "none",
    delta: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """F1: ``S = s (drop(x) (a * gain)^T + rank-space echo)``.

    Args:
        x: [n, T, K], any strides.
        a: [r, K], any strides and floating dtype.
        scaling: s.
        dropout: probability and seed; not applied where the probability is 0.
        gain: [K] or None, a factor on the columns of a.
        site: "adapter_input" adds mask * delta to drop(x), "rank" adds it to the product, "none" does neither.
        delta, mask: the echo, [n, K] or [n, r], and [n, T].
        tile, splits: launch config, and how many programs share one row's contraction; None chooses.

    Returns:
        S, [n * T, r], in x's dtype, contiguous.
    """
    rows, device = Rows.of(x), device_of(x)
    rank, width = a.shape
    block_r = configs.rank_block(rank)
    tile = tile or configs.shrink_tile(block_r, x.dtype, device.arch)
    splits = splits or configs.shrink_splits(tile, rows.total, width, device.processors)
    per_split = configs.per_split(width, tile.inner, splits)
    splits = max(1, -(-width // per_split))
    out_dtype = x.dtype if splits == 1 else accumulator_dtype(x.dtype)
    s = x.new_empty((splits, rows.total, rank), dtype=out_dtype)
    run(
        shrink_fwd_kernel,
        (-(-rows.total // tile.rows), splits),
        x.device,
        tile,
        x=x,
        a=a,
        gain=gain,
        **echo_arguments(delta, mask),
        seed=dropout.seed,
        s=s,
        M=rows.total,
        T=rows.per_sample,
        K=width,
        R=rank,
        K_PER_SPLIT=per_split,
        stride_x_n=x.stride(0),
        stride_x_t=x.stride(1),
        stride_x_k=x.stride(2),
        stride_a_r=a.stride(0),
        stride_a_k=a.stride(1),
        stride_gain=0 if gain is None else gain.stride(0),
        SCALING=float(scaling),
        **dropout_constants(dropout),
        HAS_GAIN=gain is not None,
        SITE=site,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        ACC=accumulator(x.dtype),
        PRECISION=input_precision(x.dtype),
    )
    return reduce_partials(s).to(x.dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout: Dropout,
    store_z: bool = False,
    shape: tuple[int, ...] | None = None,
    base: torch.Tensor | None = None,
    contract: bool = True,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """F2: ``y = g z + bias + mask delta`` with ``z = x W0^T + S B^T``.

    With DoRA and exact dropout, ``z = drop(x) W0^T + S B^T`` and ``y`` gains ``(x - drop(x)) W0^T``: PEFT's form.

    Args:
        x: [n, T, K]. weight: [N, K]. s: [n * T, r], unit stride, scaling included. lora_b: [N, r].
        bias, gain: [N] or None; gain is contiguous.
        delta, mask: the echo at the output, [n, N] and [n, T], or None.
        dropout: probability and seed; it only matters with a gain.
        store_z: also return z without S B^T, which the magnitude's gradient needs.
        shape: of y; None is [n * T, N]. autograd wants a result that is no view.
        base: x W0^T, [n * T, N], contiguous, where the vendor's GEMM computed it; z is base itself then.
        contract: False leaves x W0^T out of z, for the vendor's GEMM to add.
        out: where y goes, contiguous, maybe base; None makes it.
        tile: launch config; None chooses.

    Returns:
        y, and z [n * T, N], without S B^T, or None: contiguous, in x's dtype.
    """
    rows = Rows.of(x)
    d_out, d_in = weight.shape
    rank = lora_b.shape[1]
    block_r = configs.rank_step(rank)
    two_products = gain is not None and dropout.on_base
    added = base is not None or not contract
    load = configs.forward_load(gain is not None, delta is not None, two_products, added)
    tile = tile or configs.matmul_tile(rows.total, d_out, x.dtype, device_of(x), load)
    y = x.new_empty(shape or (rows.total, d_out)) if out is None else out
    z = x.new_empty((rows.total, d_out)) if store_z and base is None else None
    constants = dropout_constants(dropout if two_products else Dropout())
    constants["DORA_DROPOUT"] = constants.pop("DROPOUT")
    run(
        linear_fwd_kernel,
        (-(-rows.total // tile.rows) * -(-d_out // tile.cols),),
        x.device,
        tile,
        x=x,
        w=weight,
        s=s,
        b=lora_b,
        bias=bias,
        gain=gain,
        **echo_arguments(delta, mask),
        seed=dropout.seed,
        base=base,
        y=y,
        z=z,
        M=rows.total,
        T=rows.per_sample,
        K=d_in if contract and base is None else 0,
        N=d_out,
        R=rank,
        stride_x_n=x.stride(0),
        stride_x_t=x.stride(1),
        stride_x_k=x.stride(2),
        stride_w_n=weight.stride(0),
        stride_w_k=weight.stride(1),
        stride_s=s.stride(0),
        stride_b_n=lora_b.stride(0),
        stride_b_r=lora_b.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        **constants,
        HAS_BASE=base is not None,
        HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None,
        HAS_DELTA=delta is not None,
        STORE_Z=z is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(x.dtype),
        PRECISION=input_precision(x.dtype),
    )
    return y, base if store_z and base is not None else z
