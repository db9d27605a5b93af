"""Pieces that several kernels of this operator share."""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

import triton
import triton.language as tl

# Philox4x32 passes BigCrush from 7 rounds on; 10 would cost more than the matrix product of a thin adapter.
PHILOX_ROUNDS = tl.constexpr(7)
# Change with the lengths in a batch: whether 16 divides them is not worth another compilation.
VARYING = ("M", "T", "N_TILES", "TILES_PER_SPLIT", "stride_mask_n")


@triton.jit
def row_offsets(o_m, T, stride_n, stride_t):
    """Element offset of flat rows, where row = sample * T + position; int64, because tensors pass 2^31 elements."""
    return (o_m // T).to(tl.int64) * stride_n + (o_m % T).to(tl.int64) * stride_t


@triton.jit
def swizzled_tile(i_program, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """Tile of a program, ordered so that GROUP row tiles share the column tiles that are in the L2 cache."""
    per_group = GROUP * n_col_tiles
    i_group = i_program // per_group
    rows_here = min(n_row_tiles - i_group * GROUP, GROUP)
    i_row = i_group * GROUP + (i_program % per_group) % rows_here
    return i_row, (i_program % per_group) // rows_here


@triton.jit
def keep_mask(seed, o_m, i_k, K, DROP_BELOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of x[o_m, i_k : i_k + COLS] dropout keeps: a function of (seed, row, column) alone.

    One Philox call serves four neighbouring columns, so i_k and COLS are multiples of 4.
    """
    o_quad = i_k // 4 + tl.arange(0, COLS // 4)
    i_counter = o_m.to(tl.int64)[:, None] * tl.cdiv(K, 4) + o_quad[None, :]
    b_low = i_counter.to(tl.uint32)
    b_zero = b_low * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_low, (i_counter >> 32).to(tl.uint32), b_zero, b_zero, PHILOX_ROUNDS)
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (ROWS, COLS))
    return (b_bits >> 8).to(tl.int32) >= DROP_BELOW


@triton.jit
def dropped(
    b_x, seed, o_m, i_k, K, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """drop(x) of one block, in the accumulator's dtype."""
    m_keep = keep_mask(seed, o_m, i_k, K, DROP_BELOW, ROWS, COLS)
    b_wide = b_x.to(tl.float64) if b_x.dtype == tl.float64 else b_x.to(tl.float32)
    return tl.where(m_keep, b_wide * KEEP_SCALE, 0.0)


@triton.jit
def add_dot(b_sum, b_a, b_b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + b_a b_b, where b_sum is kept in ACC.

    Full float32 has no matrix units, and its product is one chain of FMAs: each block's chain starts from zero, since
    one chain over the whole contraction loses more digits than the vendor's GEMM does.
    """
    if b_a.dtype == ACC and PRECISION == "ieee":
        # max_num_imprecise_acc, which only float8 heeds, keeps Triton from folding the sum back into the product
        b_sum += tl.dot(b_a, b_b, input_precision=PRECISION, max_num_imprecise_acc=1, out_dtype=ACC)
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION, out_dtype=ACC)
    return b_sum


@triton.jit
def add_low_rank(
    b_z,
    s,
    b,
    o_m,
    o_n,
    m_m,
    m_n,
    R,
    stride_s,
    stride_b_n,
    stride_b_r,
    RANK_STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_z + S B^T for one output tile, in the same accumulator; rows of s are stride_s apart, b has any strides."""
    for i_step in tl.range(0, RANK_STEPS, num_stages=1):
        o_r = i_step * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_s = tl.load(
            s + o_m.to(tl.int64)[:, None] * stride_s + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
        )
        p_b = b + o_n.to(tl.int64)[None, :] * stride_b_n + o_r.to(tl.int64)[:, None] * stride_b_r
        b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_z = add_dot(b_z, b_s, b_b.to(b_s.dtype), ACC, PRECISION)
    return b_z


@triton.jit
def add_outside_gain(
    b_y,
    bias,
    delta,
    mask,
    o_m,
    o_n,
    m_m,
    m_n,
    T,
    stride_bias,
    stride_delta_n,
    stride_delta_d,
    stride_mask_n,
    stride_mask_t,
    HAS_BIAS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    ACC: tl.constexpr,
):
    """b_y + bias + mask Delta for one output tile: what DoRA's gain leaves alone."""
    if HAS_BIAS:
        b_y += tl.load(bias + o_n * stride_bias, mask=m_n, other=0.0).to(ACC)[None, :]
    if HAS_DELTA:
        b_mask = tl.load(mask + row_offsets(o_m, T, stride_mask_n, stride_mask_t), mask=m_m, other=0).to(ACC)
        o_delta = (o_m // T).to(tl.int64)[:, None] * stride_delta_n + o_n.to(tl.int64)[None, :] * stride_delta_d
        m_y = m_m[:, None] & m_n[None, :]
        b_y += b_mask[:, None] * tl.load(delta + o_delta, mask=m_y, other=0.0).to(ACC)
    return b_y


@triton.jit
def tanh(b_x):
    """tanh, to about the last bit near 0 too, where 1 - 2 / (exp(2 x) + 1) would lose what is small against 1.

    Triton's interpreter has no libdevice. The coefficients are those of Cephes' tanh and tanhf.
    """
    b_z = b_x * b_x
    if b_x.dtype == tl.float64:
        b_p = (-9.64399179425052238628e-1 * b_z - 9.92877231001918586564e1) * b_z - 1.61468768441708447952e3
        b_q = ((b_z + 1.12811678491632931402e2) * b_z + 2.23548839060100448583e3) * b_z + 4.84406305325125486048e3
        b_tail = b_p / b_q
    else:
        b_tail = ((-5.70498872745e-3 * b_z + 2.06390887954e-2) * b_z - 5.37397155531e-2) * b_z + 1.33314422036e-1
        b_tail = b_tail * b_z - 3.33332819422e-1
    b_size = tl.abs(b_x)
    b_large = 1 - 2 / (tl.exp(2 * b_size) + 1)
    return tl.where(b_size < 0.625, b_x + b_x * b_z * b_tail, tl.where(b_x < 0, -b_large, b_large))
