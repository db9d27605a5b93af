"""Kernels of small layers: one launch forward, two backward, where launching takes longer than computing.

y  = x W0^T + S B^T + bias    with S  = s drop(x) A^T, summed beside the product with W0
dX = dY W0 + drop'(dS A)      with dS = s dY B, likewise
dB = dY^T S, dA = dS^T drop(x)

Each program sums the r columns of S or dS for itself; those of the first column of tiles also store them.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

import triton
import triton.language as tl

from .triton_blocks import VARYING, add_dot, dropped, keep_mask, row_offsets, swizzled_tile


@triton.jit(do_not_specialize=VARYING)
def small_fwd_kernel(
    x,
    w,
    a,
    b,
    bias,
    seed,
    s,
    y,
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
    stride_a_r,
    stride_a_k,
    stride_b_n,
    stride_b_r,
    stride_bias,
    stride_s,
    SCALING: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m, i_n = swizzled_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_n, m_r = o_m < M, o_n < N, o_r < R
    p_x = x + row_offsets(o_m, T, stride_x_n, stride_x_t)
    p_w = w + o_n.to(tl.int64) * stride_w_n
    p_a = a + o_r.to(tl.int64) * stride_a_r
    if DROPOUT:
        seed_value = tl.load(seed)

    b_y, b_s = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_R], ACC)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_k = o_k.to(tl.int64)
        b_x = tl.load(p_x[:, None] + o_k[None, :] * stride_x_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w[None, :] + o_k[:, None] * stride_w_k, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_a = tl.load(p_a[None, :] + o_k[:, None] * stride_a_k, mask=m_k[:, None] & m_r[None, :], other=0.0)
        b_y = add_dot(b_y, b_x, b_w, ACC, PRECISION)
        b_in = b_x
        if DROPOUT:
            b_in = dropped(b_x, seed_value, o_m, i_k, K, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK_K).to(b_x.dtype)
        b_s = add_dot(b_s, b_in, b_a.to(b_x.dtype), ACC, PRECISION)

    b_low = (b_s * SCALING).to(s.dtype.element_ty)
    if i_n == 0:
        p_s = s + o_m.to(tl.int64)[:, None] * stride_s + o_r[None, :]
        tl.store(p_s, b_low, mask=m_m[:, None] & m_r[None, :])
    p_b = b + o_n.to(tl.int64)[None, :] * stride_b_n + o_r.to(tl.int64)[:, None] * stride_b_r
    b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
    b_y = add_dot(b_y, b_low, b_b.to(b_low.dtype), ACC, PRECISION)
    if HAS_BIAS:
        b_y += tl.load(bias + o_n * stride_bias, mask=m_n, other=0.0).to(ACC)[None, :]
    p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=VARYING)
def small_input_bwd_kernel(
    dy,
    w,
    a,
    b,
    seed,
    ds,
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
    stride_b_n,
    stride_b_r,
    SCALING: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m, i_col = swizzled_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    i_k = i_col * BLOCK_K
    o_m, o_k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_k + tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_k, m_r = o_m < M, o_k < K, o_r < R
    o_k = o_k.to(tl.int64)
    p_dy = dy + row_offsets(o_m, T, stride_dy_n, stride_dy_t)
    p_w = w + o_k * stride_w_k
    p_b = b + o_r.to(tl.int64) * stride_b_r

    b_dx, b_ds = tl.zeros([BLOCK_M, BLOCK_K], ACC), tl.zeros([BLOCK_M, BLOCK_R], ACC)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_n = o_n.to(tl.int64)
        b_dy = tl.load(p_dy[:, None] + o_n[None, :] * stride_dy_d, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_w = tl.load(p_w[None, :] + o_n[:, None] * stride_w_n, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b[None, :] + o_n[:, None] * stride_b_n, mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_dx = add_dot(b_dx, b_dy, b_w, ACC, PRECISION)
        b_ds = add_dot(b_ds, b_dy, b_b.to(b_dy.dtype), ACC, PRECISION)

    b_low = (b_ds * SCALING).to(ds.dtype.element_ty)
    if i_col == 0:
        p_ds = ds + o_m.to(tl.int64)[:, None] * R + o_r[None, :]
        tl.store(p_ds, b_low, mask=m_m[:, None] & m_r[None, :])
    p_a = a + o_r.to(tl.int64)[:, None] * stride_a_r + o_k[None, :] * stride_a_k
    b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
    if DROPOUT:
        b_dropped = add_dot(tl.zeros([BLOCK_M, BLOCK_K], ACC), b_low, b_a.to(b_low.dtype), ACC, PRECISION)
        m_keep = keep_mask(tl.load(seed), o_m, i_k, K, DROP_BELOW, BLOCK_M, BLOCK_K)
        b_dx += tl.where(m_keep, b_dropped * KEEP_SCALE, 0.0)
    else:
        b_dx = add_dot(b_dx, b_low, b_a.to(b_low.dtype), ACC, PRECISION)
    p_dx = dx + o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    if HAS_BASE:  # what the other projections of a group have contributed
        b_dx += tl.load(p_dx, mask=m_m[:, None] & m_k[None, :], other=0.0).to(ACC)
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=VARYING)
def small_adapter_bwd_kernel(
    dy,
    x,
    s,
    ds,
    seed,
    db,
    da,
    M,
    T,
    K,
    N,
    R,
    N_TILES,
    stride_dy_n,
    stride_dy_t,
    stride_dy_d,
    stride_x_n,
    stride_x_t,
    stride_x_k,
    stride_s,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    if i_tile < N_TILES:
        i_n = i_tile * BLOCK
        o_n = i_n + tl.arange(0, BLOCK)
        b_db = thin_sum(
            dy, s, seed, i_n, M, T, N, R, stride_dy_n, stride_dy_t, stride_dy_d, stride_s,
            False, DROP_BELOW, KEEP_SCALE, BLOCK, BLOCK_M, BLOCK_R, ACC, PRECISION,
        )  # fmt: skip
        p_db = db + o_n.to(tl.int64)[None, :] * R + o_r[:, None]
        tl.store(p_db, b_db.to(db.dtype.element_ty), mask=m_r[:, None] & (o_n < N)[None, :])
    else:
        i_k = (i_tile - N_TILES) * BLOCK
        o_k = i_k + tl.arange(0, BLOCK)
        b_da = thin_sum(
            x, ds, seed, i_k, M, T, K, R, stride_x_n, stride_x_t, stride_x_k, R,
            DROPOUT, DROP_BELOW, KEEP_SCALE, BLOCK, BLOCK_M, BLOCK_R, ACC, PRECISION,
        )  # fmt: skip
        p_da = da + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p_da, b_da.to(da.dtype.element_ty), mask=m_r[:, None] & (o_k < K)[None, :])


@triton.jit
def thin_sum(
    rows,
    thin,
    seed,
    i_col,
    M,
    T,
    WIDTH,
    R,
    stride_n,
    stride_t,
    stride_d,
    stride_thin,
    DROPOUT: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """thin^T drop(rows) of the BLOCK columns from i_col on, [BLOCK_R, BLOCK]; rows of thin are stride_thin apart."""
    o_col, o_r = i_col + tl.arange(0, BLOCK), tl.arange(0, BLOCK_R)
    m_col, m_r = o_col < WIDTH, o_r < R
    p_rows = rows + o_col.to(tl.int64)[None, :] * stride_d
    if DROPOUT:
        seed_value = tl.load(seed)
    b_sum = tl.zeros([BLOCK_R, BLOCK], ACC)
    for i_m in range(0, M, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        o_rows = row_offsets(o_m, T, stride_n, stride_t)
        b_rows = tl.load(p_rows + o_rows[:, None], mask=m_m[:, None] & m_col[None, :], other=0.0)
        p_thin = thin + o_m.to(tl.int64)[None, :] * stride_thin + o_r[:, None]
        b_thin = tl.load(p_thin, mask=m_r[:, None] & m_m[None, :], other=0.0)
        b_in = b_rows
        if DROPOUT:
            b_in = dropped(b_rows, seed_value, o_m, i_col, WIDTH, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK)
        b_sum = add_dot(b_sum, b_thin, b_in.to(b_rows.dtype), ACC, PRECISION)
    return b_sum
