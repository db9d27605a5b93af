"""Backward kernels of `echo_lora_linear`.

B1  dS = s (g * dY) B ;  dB = (g * dY)^T S ;  sums over rows for Delta, bias and magnitude      reads dY once
B2  dA = dS^T (drop(x) + echo)                                                                  reads x once
B3  dX = (g * dY) W0 + drop'(dS A)                                                              reads dY and W0 once

Sums that several programs share are written as partial sums in a fixed layout and added in a fixed order: the same
inputs give the same bits. Their launchers are in `triton_backward_launch`.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

import triton
import triton.language as tl

from .triton_blocks import VARYING, add_dot, dropped, keep_mask, row_offsets, swizzled_tile


@triton.jit(do_not_specialize=VARYING)
def adapter_bwd_kernel(
    dy,
    b,
    s,
    gain,
    z,
    mask,
    ds,
    db,
    dbias,
    dgain,
    ddelta,
    M,
    T,
    N,
    R,
    N_TILES,
    TILES_PER_SPLIT,
    stride_s,
    stride_dy_n,
    stride_dy_t,
    stride_dy_d,
    stride_b_n,
    stride_b_r,
    stride_mask_n,
    stride_mask_t,
    SCALING: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    NEED_DGAIN: tl.constexpr,
    NEED_DDELTA: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_n = o_n.to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    m_b = m_n[:, None] & m_r[None, :]
    if HAS_GAIN:
        b_gain = tl.load(gain + o_n, mask=m_n, other=0.0).to(ACC)
    p_b = b + o_n[:, None] * stride_b_n + o_r[None, :].to(tl.int64) * stride_b_r
    if NEED_DS:
        b_b = tl.load(p_b, mask=m_b, other=0.0).to(ACC)
        if HAS_GAIN:  # on B once, instead of on every block of dY
            b_b *= b_gain[:, None]
        b_b = b_b.to(dy.dtype.element_ty)
    b_db = tl.zeros([BLOCK_N, BLOCK_R], ACC)
    b_dbias = tl.zeros([BLOCK_N], ACC)
    b_dgain = tl.zeros([BLOCK_M, BLOCK_N], ACC)  # reduced once, after the loop

    tiles_per_sample = tl.cdiv(T, BLOCK_M)
    i_first = tl.program_id(1) * TILES_PER_SPLIT
    # an explicit num_stages also prefetches z, which feeds no dot
    for i_tile in tl.range(i_first, min(i_first + TILES_PER_SPLIT, N_TILES), num_stages=STAGES):
        # no tile straddles two samples, so that a tile's sum belongs to one row of Delta
        i_sample = (i_tile // tiles_per_sample).to(tl.int64)
        i_in_sample = i_tile % tiles_per_sample
        o_t = i_in_sample * BLOCK_M + tl.arange(0, BLOCK_M)
        m_t = o_t < T
        o_t = o_t.to(tl.int64)
        o_m = i_sample * T + o_t
        p_dy = dy + (i_sample * stride_dy_n + o_t * stride_dy_t)[:, None] + o_n[None, :] * stride_dy_d
        m_dy = m_t[:, None] & m_n[None, :]
        b_dy = tl.load(p_dy, mask=m_dy, other=0.0)
        m_s = m_t[:, None] & m_r[None, :]
        if NEED_DS:
            b_ds = tl.dot(b_dy, b_b, input_precision=PRECISION, out_dtype=ACC) * SCALING
            p_ds = ds + (i_n.to(tl.int64) * M + o_m)[:, None] * R + o_r[None, :]
            tl.store(p_ds, b_ds.to(ds.dtype.element_ty), mask=m_s)
        if NEED_DB or NEED_DGAIN:
            b_s = tl.load(s + o_m[:, None] * stride_s + o_r[None, :], mask=m_s, other=0.0)
            b_db = add_dot(b_db, tl.trans(b_dy), b_s, ACC, PRECISION)
        if NEED_DBIAS:
            b_dbias += tl.sum(b_dy.to(ACC), 0)
        if NEED_DGAIN:
            b_z = tl.load(z + o_m[:, None] * N + o_n[None, :], mask=m_dy, other=0.0)
            b_dgain += b_dy.to(ACC) * b_z.to(ACC)
        if NEED_DDELTA:
            p_mask = mask + i_sample * stride_mask_n + o_t * stride_mask_t
            b_mask = tl.load(p_mask, mask=m_t, other=0).to(ACC)
            b_ddelta = tl.sum(b_dy.to(ACC) * b_mask[:, None], 0)
            tl.store(ddelta + (i_sample * tiles_per_sample + i_in_sample) * N + o_n, b_ddelta, mask=m_n)

    o_out = i_split * N + o_n
    if NEED_DBIAS:
        tl.store(dbias + o_out, b_dbias, mask=m_n)
    if NEED_DGAIN:  # z comes without S B^T
        b_b = tl.load(p_b, mask=m_b, other=0.0).to(dy.dtype.element_ty).to(ACC)
        tl.store(dgain + o_out, tl.sum(b_dgain, 0) + tl.sum(b_db * b_b, 1), mask=m_n)
    if NEED_DB:
        if HAS_GAIN:
            b_db *= b_gain[:, None]
        tl.store(db + o_out[:, None] * R + o_r[None, :], b_db, mask=m_b)


@triton.jit(do_not_specialize=VARYING)
def lora_a_bwd_kernel(
    x,
    ds,
    delta,
    mask,
    seed,
    da,
    M,
    T,
    K,
    R,
    M_PER_SPLIT,
    stride_x_n,
    stride_x_t,
    stride_x_k,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_k, i_split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    o_k = i_k + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_k = o_k.to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    if DROPOUT:
        seed_value = tl.load(seed)

    b_da = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    i_begin = i_split * M_PER_SPLIT
    for i_m in range(i_begin, min(i_begin + M_PER_SPLIT, M), BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_x = m_m[:, None] & m_k[None, :]
        p_x = x + row_offsets(o_m, T, stride_x_n, stride_x_t)[:, None] + o_k[None, :] * stride_x_k
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        b_in = b_x
        if DROPOUT:
            b_in = dropped(b_x, seed_value, o_m, i_k, K, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK_K)
        if HAS_DELTA:
            b_mask = tl.load(mask + row_offsets(o_m, T, stride_mask_n, stride_mask_t), mask=m_m, other=0).to(ACC)
            p_delta = delta + (o_m // T).to(tl.int64)[:, None] * stride_delta_n + o_k[None, :] * stride_delta_d
            b_in = b_in.to(ACC) + b_mask[:, None] * tl.load(p_delta, mask=m_x, other=0.0).to(ACC)
        p_ds = ds + o_m.to(tl.int64)[None, :] * R + o_r[:, None]
        b_ds = tl.load(p_ds, mask=m_r[:, None] & m_m[None, :], other=0.0)
        b_da = add_dot(b_da, b_ds, b_in.to(b_x.dtype), ACC, PRECISION)

    p_da = da + (i_split.to(tl.int64) * R + o_r)[:, None] * K + o_k[None, :]
    tl.store(p_da, b_da.to(da.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


@triton.jit
def add_adapter(
    b_dx,
    ds,
    a,
    o_m,
    o_k,
    m_m,
    m_k,
    R,
    stride_a_r,
    stride_a_k,
    RANK_STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_dx + dS A for one output tile; rows of ds are R apart, a has any strides."""
    for i_step in tl.range(0, RANK_STEPS, num_stages=1):
        o_r = i_step * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_ds = tl.load(ds + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        p_a = a + o_r.to(tl.int64)[:, None] * stride_a_r + o_k[None, :] * stride_a_k
        b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_dx = add_dot(b_dx, b_ds, b_a.to(b_ds.dtype), ACC, PRECISION)
    return b_dx


@triton.jit(do_not_specialize=VARYING)
def input_bwd_kernel(
    dy,
    w,
    ds,
    a,
    gain,
    seed,
    dx,
    M,
    T,
    K,
    N,
    R,
    stride_dy_n,
    stride_dy_t,
    stride_dy_d,
    stride_w_n,
    stride_w_k,
    stride_a_r,
    stride_a_k,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DORA_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m, i_col = swizzled_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_k = i_col * BLOCK_K
    o_k = i_k + tl.arange(0, BLOCK_K)
    m_m, m_k = o_m < M, o_k < K
    o_k = o_k.to(tl.int64)
    p_dy = dy + row_offsets(o_m, T, stride_dy_n, stride_dy_t)
    p_w = w + o_k * stride_w_k

    # dropout masks the adapter's share only, so that share comes before the rest; it comes after it where every
    # step of the rest would be rounded to the digits of a sum that holds it
    ADAPTER_LAST: tl.constexpr = dy.dtype.element_ty == ACC
    b_dropped = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    if RANK_STEPS > 0 and not ADAPTER_LAST:
        b_dropped = add_adapter(
            b_dropped, ds, a, o_m, o_k, m_m, m_k, R, stride_a_r, stride_a_k, RANK_STEPS, BLOCK_R, ACC, PRECISION
        )  # fmt: skip
    if DROPOUT:
        seed_value = tl.load(seed)
    if DORA_DROPOUT or ADAPTER_LAST:
        b_dx = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    elif DROPOUT:
        m_keep = keep_mask(seed_value, o_m, i_k, K, DROP_BELOW, BLOCK_M, BLOCK_K)
        b_dx = tl.where(m_keep, b_dropped * KEEP_SCALE, 0.0)
    else:
        b_dx = b_dropped

    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_n = o_n.to(tl.int64)
        b_dy = tl.load(p_dy[:, None] + o_n[None, :] * stride_dy_d, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_w = tl.load(p_w[None, :] + o_n[:, None] * stride_w_n, mask=m_n[:, None] & m_k[None, :], other=0.0)
        if HAS_GAIN:
            b_gain = tl.load(gain + o_n, mask=m_n, other=0.0).to(ACC)
        if DORA_DROPOUT:
            b_rest = (b_dy.to(ACC) * (b_gain - 1.0)[None, :]).to(b_dy.dtype)
            b_dropped = add_dot(b_dropped, b_rest, b_w, ACC, PRECISION)
        elif HAS_GAIN:
            b_dy = (b_dy.to(ACC) * b_gain[None, :]).to(b_dy.dtype)
        b_dx = add_dot(b_dx, b_dy, b_w, ACC, PRECISION)
    if RANK_STEPS > 0 and ADAPTER_LAST:
        b_dropped = add_adapter(
            b_dropped, ds, a, o_m, o_k, m_m, m_k, R, stride_a_r, stride_a_k, RANK_STEPS, BLOCK_R, ACC, PRECISION
        )  # fmt: skip
    if DORA_DROPOUT or ADAPTER_LAST:
        if DROPOUT:
            m_keep = keep_mask(seed_value, o_m, i_k, K, DROP_BELOW, BLOCK_M, BLOCK_K)
            b_dropped = tl.where(m_keep, b_dropped * KEEP_SCALE, 0.0)
        b_dx += b_dropped

    p_dx = dx + o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    if HAS_BASE:  # what the other projections of a group have contributed
        b_dx += tl.load(p_dx, mask=m_m[:, None] & m_k[None, :], other=0.0).to(ACC)
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])
