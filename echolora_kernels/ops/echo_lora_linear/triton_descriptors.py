"""The two large products for Hopper and newer: tiles come through tensor descriptors (TMA), programs are persistent.

Same results and arguments as `triton_forward.linear` and `triton_backward_launch.input_backward`. Each program walks
over many output tiles, so that the epilogue of one overlaps the loads of the next. What is thin (S, A, B, vectors)
comes through pointers: any rank, any adapter dtype.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .configs import Tile
from .dropout import Dropout
from .launch import accumulator, device_of, dropout_constants, echo_arguments, input_precision, run
from .rows import Rows, one_sample
from .triton_blocks import add_low_rank, add_outside_gain, keep_mask, swizzled_tile


@triton.jit
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
    n_row_tiles, n_col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for i_tile in range(tl.program_id(0), n_row_tiles * n_col_tiles, PROGRAMS):
        i_m, i_n = swizzled_tile(i_tile, n_row_tiles, n_col_tiles, GROUP)
        i_row, i_col = i_m * BLOCK_M, i_n * BLOCK_N
        o_m, o_n = i_row + tl.arange(0, BLOCK_M), i_col + tl.arange(0, BLOCK_N)
        m_m, m_n = o_m < M, o_n < N

        b_z = tl.zeros([BLOCK_M, BLOCK_N], ACC)
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


@triton.jit
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
    n_row_tiles, n_col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    for i_tile in range(tl.program_id(0), n_row_tiles * n_col_tiles, PROGRAMS):
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
        the others: as in `triton_forward.linear`.
    """
    rows, device = Rows.of(x), device_of(x)
    (d_out, d_in), rank = weight.shape, lora_b.shape[1]
    tile = tile or configs.descriptor_tile(
        rows.total, d_out, rank, x.dtype, device, rich=gain is not None or delta is not None
    )
    y = x.new_empty(shape or (rows.total, d_out))
    z = x.new_empty((rows.total, d_out)) if store_z else None
    programs = min(device.processors, -(-rows.total // tile.rows) * -(-d_out // tile.cols))
    block_r = configs.rank_step(rank)
    run(
        linear_descriptor_fwd_kernel,
        (programs,),
        x.device,
        tile,
        x=TensorDescriptor.from_tensor(one_sample(x)[0], [tile.rows, tile.inner]),
        w=TensorDescriptor.from_tensor(weight, [tile.cols, tile.inner]),
        y=TensorDescriptor.from_tensor(y.view(rows.total, d_out), [tile.rows, tile.cols]),
        s=s,
        b=lora_b,
        bias=bias,
        gain=gain,
        **echo_arguments(delta, mask),
        z=z,
        M=rows.total,
        T=rows.per_sample,
        K=d_in,
        N=d_out,
        R=rank,
        stride_s=s.stride(0),
        stride_b_n=lora_b.stride(0),
        stride_b_r=lora_b.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        PROGRAMS=programs,
        HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None,
        HAS_DELTA=delta is not None,
        STORE_Z=store_z,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(x.dtype),
        PRECISION=input_precision(x.dtype),
    )
    return y, z


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
    rows, device = Rows.of(dy), device_of(dy)
    (d_out, d_in), rank = weight.shape, lora_a.shape[0]
    tile = tile or configs.descriptor_tile(rows.total, d_in, rank, dy.dtype, device, rich=dropout.p > 0)
    dx = dy.new_empty((rows.total, d_in))
    programs = min(device.processors, -(-rows.total // tile.rows) * -(-d_in // tile.cols))
    block_r = configs.rank_step(rank)
    run(
        input_descriptor_bwd_kernel,
        (programs,),
        dy.device,
        tile,
        dy=TensorDescriptor.from_tensor(one_sample(dy)[0], [tile.rows, tile.inner]),
        w=TensorDescriptor.from_tensor(weight, [tile.inner, tile.cols]),
        dx=TensorDescriptor.from_tensor(dx, [tile.rows, tile.cols]),
        ds=ds,
        a=lora_a,
        seed=dropout.seed,
        M=rows.total,
        K=d_in,
        N=d_out,
        R=rank,
        stride_a_r=lora_a.stride(0),
        stride_a_k=lora_a.stride(1),
        PROGRAMS=programs,
        **dropout_constants(dropout),
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
