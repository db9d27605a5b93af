"""Kernels over the networks of all modules: a program has rows of one module's up-projections.

PARTS, STARTS and WIDTHS are tuples with a number for each module: its first program, its first row, how many rows.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

import triton
import triton.language as tl

from ..echo_lora_linear.triton_blocks import add_dot, tanh


@triton.jit
def module_of(i_part, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """The module that part `i_part` belongs to."""
    i_module = 0
    for i in tl.static_range(1, COUNT):
        i_module = tl.where(i_part >= PARTS[i], i, i_module)
    return i_module


@triton.jit
def of_module(i_module, COUNT: tl.constexpr, VALUES: tl.constexpr):
    """VALUES[i_module], for a number that is known at run time alone."""
    value = VALUES[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(i_module == i, VALUES[i], value)
    return value


@triton.jit
def sigmoid(b_x):
    return 1 / (1 + tl.exp(-b_x))


@triton.jit
def networks_down_fwd_kernel(
    u,
    down,
    h,
    N,
    K,
    HIDDEN,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_h, m_n = o_h < HIDDEN, o_n < N
    o_h, o_n = o_h.to(tl.int64), o_n.to(tl.int64)

    b_sum = tl.zeros([BLOCK_N, BLOCK_H], ACC)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_u = tl.load(u + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_down = tl.load(down + o_h[None, :] * K + o_k[:, None], mask=m_k[:, None] & m_h[None, :], other=0.0)
        b_sum = add_dot(b_sum, b_u, b_down, ACC, PRECISION)
    tl.store(h + o_n[:, None] * HIDDEN + o_h[None, :], tanh(b_sum), mask=m_n[:, None] & m_h[None, :])


@triton.jit
def load_rows(tensor, o_rows, o_m, m_rows, M, ACC: tl.constexpr):
    """Rows of a matrix [..., M], zero outside, in the accumulator's dtype."""
    m_rows = m_rows[:, None] & (o_m < M)[None, :]
    return tl.load(tensor + o_rows[:, None] * M + o_m[None, :], mask=m_rows, other=0.0).to(ACC)


@triton.jit
def projection_and_gate(
    b_proj_hidden, b_gate_hidden, b_proj_up, b_gate_up, b_bias, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Both before lambda, [BLOCK_N, BLOCK_C]."""
    b_projection = tl.dot(b_proj_hidden, tl.trans(b_proj_up), input_precision=PRECISION, out_dtype=ACC)
    b_gate = tl.dot(b_gate_hidden, tl.trans(b_gate_up), input_precision=PRECISION, out_dtype=ACC)
    return b_projection, sigmoid(b_gate + b_bias[None, :])


@triton.jit
def networks_up_fwd_kernel(
    h,
    proj_up,
    gate_up,
    gate_bias,
    scale,
    delta,
    N,
    M,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_part = tl.program_id(0)
    i_module = module_of(i_part, COUNT, PARTS)
    start, width = of_module(i_module, COUNT, STARTS), of_module(i_module, COUNT, WIDTHS)
    o_c = (i_part - of_module(i_module, COUNT, PARTS)) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = o_c < width, o_n < N
    o_n, o_m = o_n.to(tl.int64), tl.arange(0, BLOCK_M)
    o_row = (start + o_c).to(tl.int64)

    o_hidden = o_n * (2 * COUNT) + 2 * i_module
    b_projection, b_gate = projection_and_gate(
        load_rows(h, o_hidden, o_m, m_n, M, ACC),
        load_rows(h, o_hidden + 1, o_m, m_n, M, ACC),
        load_rows(proj_up, o_row, o_m, m_c, M, ACC),
        load_rows(gate_up, o_row, o_m, m_c, M, ACC),
        tl.load(gate_bias + o_row, mask=m_c, other=0.0).to(ACC),
        ACC,
        PRECISION,
    )
    b_delta = tl.load(scale + i_module).to(ACC) * b_gate * b_projection
    p_delta = delta + start.to(tl.int64) * N + o_n[:, None] * width + o_c[None, :]
    tl.store(p_delta, b_delta, mask=m_n[:, None] & m_c[None, :])


@triton.jit
def networks_up_bwd_kernel(
    ddelta,
    h,
    proj_up,
    gate_up,
    gate_bias,
    scale,
    dproj_up,
    dgate_up,
    dgate_bias,
    dh_parts,
    dscale_parts,
    N,
    M,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_part = tl.program_id(0)
    i_module = module_of(i_part, COUNT, PARTS)
    start, width = of_module(i_module, COUNT, STARTS), of_module(i_module, COUNT, WIDTHS)
    o_c = (i_part - of_module(i_module, COUNT, PARTS)) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c, o_m = o_c < width, tl.arange(0, BLOCK_M)
    o_row = (start + o_c).to(tl.int64)
    b_proj_up = load_rows(proj_up, o_row, o_m, m_c, M, ACC)
    b_gate_up = load_rows(gate_up, o_row, o_m, m_c, M, ACC)
    b_bias = tl.load(gate_bias + o_row, mask=m_c, other=0.0).to(ACC)
    b_scale = tl.load(scale + i_module).to(ACC)
    p_ddelta = ddelta + start.to(tl.int64) * N

    b_dproj_up, b_dgate_up = tl.zeros([BLOCK_C, BLOCK_M], ACC), tl.zeros([BLOCK_C, BLOCK_M], ACC)
    b_dbias, b_dscale = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_n = o_n.to(tl.int64)
        o_hidden = o_n * (2 * COUNT) + 2 * i_module
        b_proj_hidden = load_rows(h, o_hidden, o_m, m_n, M, ACC)
        b_gate_hidden = load_rows(h, o_hidden + 1, o_m, m_n, M, ACC)
        b_projection, b_gate = projection_and_gate(
            b_proj_hidden, b_gate_hidden, b_proj_up, b_gate_up, b_bias, ACC, PRECISION
        )
        m_delta = m_n[:, None] & m_c[None, :]
        # an infinite weight times the zeros of samples that are not there is NaN
        b_projection, b_gate = tl.where(m_delta, b_projection, 0.0), tl.where(m_delta, b_gate, 0.0)
        b_ddelta = tl.load(p_ddelta + o_n[:, None] * width + o_c[None, :], mask=m_delta, other=0.0).to(ACC)
        b_gated = b_ddelta * b_gate
        b_dgate = b_scale * (b_gated * b_projection) * (1 - b_gate)
        b_dscale += tl.sum(b_gated * b_projection, 0)
        b_dbias += tl.sum(b_dgate, 0)
        b_dprojection = b_scale * b_gated
        b_dproj_up = tl.dot(
            tl.trans(b_dprojection), b_proj_hidden, b_dproj_up, input_precision=PRECISION, out_dtype=ACC
        )
        b_dgate_up = tl.dot(tl.trans(b_dgate), b_gate_hidden, b_dgate_up, input_precision=PRECISION, out_dtype=ACC)
        p_dh = dh_parts + (i_part.to(tl.int64) * N + o_n)[:, None] * (2 * M) + o_m[None, :]
        m_dh = m_n[:, None] & (o_m < M)[None, :]
        b_dh = tl.dot(b_dprojection, b_proj_up, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p_dh, b_dh, mask=m_dh)
        b_dh = tl.dot(b_dgate, b_gate_up, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p_dh + M, b_dh, mask=m_dh)

    m_up = m_c[:, None] & (o_m < M)[None, :]
    o_up = o_row[:, None] * M + o_m[None, :]
    tl.store(dproj_up + o_up, b_dproj_up, mask=m_up)
    tl.store(dgate_up + o_up, b_dgate_up, mask=m_up)
    tl.store(dgate_bias + o_row, b_dbias, mask=m_c)
    tl.store(dscale_parts + i_part, tl.sum(b_dscale, 0))


@triton.jit
def networks_sum_bwd_kernel(
    dh_parts,
    dscale_parts,
    h,
    da,
    dscale,
    N,
    M,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    """The parts of a module added up: a program has one sample's W1 or U1 half; ENDS: the parts' ends."""
    i_half, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_module = i_half // 2
    first, last = of_module(i_module, COUNT, PARTS), of_module(i_module, COUNT, ENDS)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_dh = dh_parts + i_n * (2 * M) + (i_half % 2) * M + o_m[None, :]

    b_dh = tl.zeros([BLOCK_M], ACC)
    b_dscale = tl.zeros([BLOCK_P], ACC)
    for i_part in range(first, last, BLOCK_P):
        o_p = i_part + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        o_dh = o_p.to(tl.int64)[:, None] * N * (2 * M)
        b_dh += tl.sum(tl.load(p_dh + o_dh, mask=m_p[:, None] & m_m[None, :], other=0.0), 0)
        b_dscale += tl.load(dscale_parts + o_p, mask=m_p, other=0.0)
    o_a = (i_n * (2 * COUNT) + i_half) * M + o_m
    b_h = tl.load(h + o_a, mask=m_m, other=0.0)
    tl.store(da + o_a, b_dh * (1 - b_h * b_h), mask=m_m)
    if (i_half % 2 == 0) & (i_n == 0):
        tl.store(dscale + i_module, tl.sum(b_dscale, 0))
