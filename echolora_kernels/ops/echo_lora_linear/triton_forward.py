"""Forward kernels of `echo_lora_linear`.

F1  S = s (drop(x) A^T + rank-space echo)             reads x once
F2  y = g (x W0^T + S B^T) + bias + mask Delta        reads x and W0 once, S and B add r columns to the contraction
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

import triton
import triton.language as tl

from .triton_blocks import VARYING, add_dot, add_low_rank, add_outside_gain, dropped, row_offsets, swizzled_tile


@triton.jit(do_not_specialize=VARYING)
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
    stride_s,
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
        b_s = add_dot(b_s, b_in.to(b_x.dtype), b_a.to(b_x.dtype), ACC, PRECISION)

    if SITE == "rank" and i_split == 0:
        m_s = m_m[:, None] & m_r[None, :]
        b_delta = tl.load(p_delta[:, None] + o_r[None, :].to(tl.int64) * stride_delta_d, mask=m_s, other=0.0).to(ACC)
        b_s += b_mask[:, None] * b_delta
    p_s = s + (i_split.to(tl.int64) * M + o_m)[:, None] * stride_s + o_r[None, :]
    tl.store(p_s, (b_s * SCALING).to(s.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=VARYING)
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
    # K is 0 with a base product, which is done; in float32 it comes last, so that S B^T has a sum of its own
    BASE_LAST: tl.constexpr = HAS_BASE and x.dtype.element_ty == ACC
    if HAS_BASE and not BASE_LAST:
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
        b_y = add_dot(b_y, b_x, b_w, ACC, PRECISION)
        if DORA_DROPOUT:
            b_dropped = dropped(b_x, seed_value, o_m, i_k, K, DROP_BELOW, KEEP_SCALE, BLOCK_M, BLOCK_K)
            b_z = add_dot(b_z, b_dropped.to(b_x.dtype), b_w, ACC, PRECISION)
    if DORA_DROPOUT:
        b_y -= b_z  # the frozen layer on x - drop(x), which no gain scales
    else:
        b_z = b_y

    if STORE_Z:
        tl.store(z + o_y, b_z.to(z.dtype.element_ty), mask=m_y)
    b_z = add_low_rank(
        b_z, s, b, o_m, o_n, m_m, m_n, R, stride_s, stride_b_n, stride_b_r, RANK_STEPS, BLOCK_R, ACC, PRECISION
    )  # fmt: skip
    if BASE_LAST:
        b_z += tl.load(base + o_y, mask=m_y, other=0.0).to(ACC)
    if HAS_GAIN:
        b_z *= tl.load(gain + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    if DORA_DROPOUT:
        b_z += b_y
    b_z = add_outside_gain(
        b_z, bias, delta, mask, o_m, o_n, m_m, m_n, T, stride_bias, stride_delta_n, stride_delta_d,
        stride_mask_n, stride_mask_t, HAS_BIAS, HAS_DELTA, ACC,
    )  # fmt: skip
    tl.store(y + o_y, b_z.to(y.dtype.element_ty), mask=m_y)
