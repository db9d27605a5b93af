"""Product of a matrix and a factor per row, read and written once: DoRA's gain on what the vendor's GEMM multiplies."""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .configs import Device
from .launch import Kind, Launch, accumulator, device_of, kind, planned


@triton.jit
def scale_rows_kernel(
    matrix,
    factor,
    out,
    ROWS,
    COLS,
    stride_matrix_row,
    stride_matrix_col,
    stride_out_row,
    stride_out_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    n_col_tiles = tl.cdiv(COLS, BLOCK_COLS)
    o_row = (tl.program_id(0) // n_col_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_col = (tl.program_id(0) % n_col_tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    m_row, m_col = o_row < ROWS, o_col < COLS
    m_both = m_row[:, None] & m_col[None, :]
    o_row, o_col = o_row.to(tl.int64), o_col.to(tl.int64)
    b_factor = tl.load(factor + o_row, mask=m_row, other=0.0).to(ACC)
    p_matrix = matrix + o_row[:, None] * stride_matrix_row + o_col[None, :] * stride_matrix_col
    b_out = tl.load(p_matrix, mask=m_both, other=0.0).to(ACC) * b_factor[:, None]
    p_out = out + o_row[:, None] * stride_out_row + o_col[None, :] * stride_out_col
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_both)


def scale_rows(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``factor * matrix``, one factor a row, rounded once.

    Args:
        matrix: [rows, cols], any strides. factor: [rows], contiguous, in float32 or wider.

    Returns:
        [rows, cols], in matrix's dtype, and in its memory layout where that is dense.
    """
    out = torch.empty_like(matrix)
    plan = _scale_plan(kind(matrix), out.stride(), device_of(matrix))
    plan.run(matrix.device, matrix=matrix, factor=factor, out=out)
    return out


@planned
def _scale_plan(matrix: Kind, out: tuple[int, ...], device: Device) -> Launch:
    (rows, cols), strides, dtype = matrix
    tile = configs.scale_tile(dtype, device.arch)
    return Launch(
        scale_rows_kernel,
        (-(-rows // tile.rows) * -(-cols // tile.cols),),
        tile,
        ROWS=rows,
        COLS=cols,
        stride_matrix_row=strides[0],
        stride_matrix_col=strides[1],
        stride_out_row=out[0],
        stride_out_col=out[1],
        BLOCK_ROWS=tile.rows,
        BLOCK_COLS=tile.cols,
        ACC=accumulator(dtype),
    )
