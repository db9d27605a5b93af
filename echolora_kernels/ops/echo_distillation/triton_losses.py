"""The Triton kernels as one set, `kernels.Kernels`: a row's losses by one program, its gradient by one for each block.

Formulas are in csrc/cpu/distillation.h; the temperature is compiled in, so each new value costs one compilation.
"""

# ruff: noqa: N803  (compile-time constants are upper case, compared or passed)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..echo_lora_linear.configs import Tile, dtype_class
from ..echo_lora_linear.launch import accumulator, named_strides, run, strides, want_runnable
from ..echo_lora_linear.rows import accumulator_dtype
from ..echo_lora_linear.triton_blocks import VARYING, row_offsets
from .kernels import STATS
from .result import IGNORE_INDEX

__all__ = ["backward", "forward", "forward_and_overwrite", "want_runnable"]

# columns at a time, by dtype class: what stays in registers of 8 or 4 warps
FORWARD_TILES = {"half": Tile(1, 4096, 0, 8, 1), "single": Tile(1, 4096, 0, 8, 1), "double": Tile(1, 1024, 0, 8, 1)}
BACKWARD_TILES = {"half": Tile(1, 1024, 0, 4, 1), "single": Tile(1, 1024, 0, 4, 1), "double": Tile(1, 512, 0, 4, 1)}

NO_TARGET = tl.constexpr(IGNORE_INDEX)
ROW_STATS = tl.constexpr(STATS)


@triton.jit
def logits_at(p_row, o_v, V, stride_v, ACC: tl.constexpr):
    """One block of a row; what is behind its end is -infinity, which adds nothing to any sum."""
    return tl.load(p_row + o_v.to(tl.int64) * stride_v, mask=o_v < V, other=-float("inf")).to(ACC)


@triton.jit
def powers(b_x, TEMPERATURE: tl.constexpr):
    """exp(x), exp(x / tau) and x / tau."""
    b_cooled = b_x / TEMPERATURE
    b_tempered = tl.exp(b_cooled)
    if TEMPERATURE == 1:
        b_plain = b_tempered
    elif TEMPERATURE == 2:
        b_plain = b_tempered * b_tempered
    else:
        b_plain = tl.exp(b_x)
    return b_plain, b_tempered, b_cooled


@triton.jit
def max_and_sums(p_row, V, stride_v, TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr):
    """max, z = sum of exp(x - max), and the z of the tempered logits, in one pass."""
    b_max = tl.full([], -float("inf"), ACC)
    b_z, b_z_tau = tl.zeros([], ACC), tl.zeros([], ACC)
    for i_v in range(0, V, BLOCK_V):
        b_x = logits_at(p_row, i_v + tl.arange(0, BLOCK_V), V, stride_v, ACC)
        b_new = tl.maximum(b_max, tl.max(b_x, 0))
        b_from = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing but excluded tokens up to here
        b_shrunk, b_shrunk_tau, _ = powers(b_max - b_from, TEMPERATURE)
        b_plain, b_tempered, _ = powers(b_x - b_from, TEMPERATURE)
        b_z = b_z * b_shrunk + tl.sum(b_plain, 0)
        b_z_tau = b_z_tau * b_shrunk_tau + tl.sum(b_tempered, 0)
        b_max = b_new
    return b_max, b_z, b_z_tau


@triton.jit
def probability(b_power, b_inverse_z):
    """The choice keeps this product from being fused into a difference, which would not be 0 for equal branches."""
    return tl.where(b_power == 0, 0.0, b_power * b_inverse_z)


@triton.jit
def cross_entropy(p_row, i_target, V, stride_v, b_max, b_z, ACC: tl.constexpr):
    """CE of one row; NaN where the target is no column."""
    is_column = (i_target >= 0) & (i_target < V)
    b_logit = tl.load(p_row + i_target * stride_v, mask=is_column, other=float("nan")).to(ACC)
    return tl.log(b_z) - (b_logit - b_max)


@triton.jit
def times_log_ratio(b_p, b_log_ratio):
    """p log ratio, where 0 log 0 = 0."""
    return tl.where(b_p == 0, 0.0, b_p * b_log_ratio)


@triton.jit(do_not_specialize=VARYING)
def distillation_fwd_kernel(
    off,
    on,
    targets,
    losses,
    stats,
    T,
    V,
    stride_off_n,
    stride_off_t,
    stride_off_v,
    stride_on_n,
    stride_on_t,
    stride_on_v,
    TEMPERATURE: tl.constexpr,
    HAS_ON: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_target = tl.load(targets + i_row)
    p_losses = losses + i_row.to(tl.int64) * 3
    p_stats = stats + i_row.to(tl.int64) * ROW_STATS
    b_zero = tl.zeros([], ACC)
    b_ce_off, b_ce_on, b_kl = b_zero, b_zero, b_zero
    b_max_off, b_z_off, b_z_tau_off = b_zero, b_zero, b_zero
    b_max_on, b_z_on, b_z_tau_on = b_zero, b_zero, b_zero
    if i_target != NO_TARGET:
        p_off = off + row_offsets(i_row, T, stride_off_n, stride_off_t)
        b_max_off, b_z_off, b_z_tau_off = max_and_sums(p_off, V, stride_off_v, TEMPERATURE, BLOCK_V, ACC)
        b_ce_off = cross_entropy(p_off, i_target, V, stride_off_v, b_max_off, b_z_off, ACC)
        if HAS_ON:
            p_on = on + row_offsets(i_row, T, stride_on_n, stride_on_t)
            b_max_on, b_z_on, b_z_tau_on = max_and_sums(p_on, V, stride_on_v, TEMPERATURE, BLOCK_V, ACC)
            b_ce_on = cross_entropy(p_on, i_target, V, stride_on_v, b_max_on, b_z_on, ACC)
            b_log_off, b_log_on = tl.log(b_z_tau_off), tl.log(b_z_tau_on)
            b_inverse_off, b_inverse_on = 1 / b_z_tau_off, 1 / b_z_tau_on
            for i_v in range(0, V, BLOCK_V):
                o_v = i_v + tl.arange(0, BLOCK_V)
                b_a = logits_at(p_off, o_v, V, stride_off_v, ACC) - b_max_off
                b_b = logits_at(p_on, o_v, V, stride_on_v, ACC) - b_max_on
                _, b_q, b_cooled_a = powers(b_a, TEMPERATURE)
                _, b_p, b_cooled_b = powers(b_b, TEMPERATURE)
                b_p = probability(b_p, b_inverse_on)
                b_log_ratio = (b_cooled_b - b_log_on) - (b_cooled_a - b_log_off)
                # q - p sums to 0, and takes away what rounding does to the sums z
                b_kl += tl.sum(times_log_ratio(b_p, b_log_ratio) + (probability(b_q, b_inverse_off) - b_p), 0)
    tl.store(p_losses, b_ce_off)
    tl.store(p_losses + 1, b_ce_on)
    tl.store(p_losses + 2, b_kl)
    tl.store(p_stats, b_max_off)
    tl.store(p_stats + 1, 1 / b_z_off)
    tl.store(p_stats + 2, 1 / b_z_tau_off)
    tl.store(p_stats + 3, b_max_on)
    tl.store(p_stats + 4, 1 / b_z_on)
    tl.store(p_stats + 5, 1 / b_z_tau_on)
    tl.store(p_stats + 6, b_kl)


@triton.jit(do_not_specialize=VARYING)
def distillation_bwd_kernel(
    off,
    on,
    targets,
    stats,
    scales,
    d_off,
    d_on,
    T,
    V,
    stride_off_n,
    stride_off_t,
    stride_off_v,
    stride_on_n,
    stride_on_t,
    stride_on_v,
    stride_d_off_n,
    stride_d_off_t,
    stride_d_off_v,
    stride_d_on_n,
    stride_d_on_t,
    stride_d_on_v,
    TEMPERATURE: tl.constexpr,
    HAS_ON: tl.constexpr,
    OFF_LEARNS: tl.constexpr,
    ON_LEARNS: tl.constexpr,
    NEED_OFF: tl.constexpr,
    NEED_ON: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row = tl.program_id(0)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    i_target = tl.load(targets + i_row)
    p_stats = stats + i_row.to(tl.int64) * ROW_STATS
    b_d_off, b_d_on = tl.zeros([BLOCK_V], ACC), tl.zeros([BLOCK_V], ACC)
    if i_target != NO_TARGET:
        b_ce_off, b_ce_on, b_kl = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2) / TEMPERATURE
        b_a = logits_at(off + row_offsets(i_row, T, stride_off_n, stride_off_t), o_v, V, stride_off_v, ACC)
        b_plain, b_q, b_cooled_a = powers(b_a - tl.load(p_stats), TEMPERATURE)
        b_onehot = tl.where(o_v == i_target, 1.0, 0.0).to(ACC)
        b_d_off = (probability(b_plain, tl.load(p_stats + 1)) - b_onehot) * b_ce_off
        if HAS_ON:
            b_b = logits_at(on + row_offsets(i_row, T, stride_on_n, stride_on_t), o_v, V, stride_on_v, ACC)
            b_plain, b_p, b_cooled_b = powers(b_b - tl.load(p_stats + 3), TEMPERATURE)
            b_inverse_off, b_inverse_on = tl.load(p_stats + 2), tl.load(p_stats + 5)
            b_p = probability(b_p, b_inverse_on)
            if OFF_LEARNS:
                b_d_off += (probability(b_q, b_inverse_off) - b_p) * b_kl
            b_d_on = (probability(b_plain, tl.load(p_stats + 4)) - b_onehot) * b_ce_on
            if ON_LEARNS:
                b_log_ratio = (b_cooled_b + tl.log(b_inverse_on)) - (b_cooled_a + tl.log(b_inverse_off))
                b_d_on += times_log_ratio(b_p, b_log_ratio - tl.load(p_stats + 6)) * b_kl
    if NEED_OFF:
        p_d_off = d_off + row_offsets(i_row, T, stride_d_off_n, stride_d_off_t) + o_v.to(tl.int64) * stride_d_off_v
        tl.store(p_d_off, b_d_off, mask=m_v)
    if NEED_ON:
        p_d_on = d_on + row_offsets(i_row, T, stride_d_on_n, stride_d_on_t) + o_v.to(tl.int64) * stride_d_on_v
        tl.store(p_d_on, b_d_on, mask=m_v)


def forward(
    off: torch.Tensor, on: torch.Tensor | None, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Kernels`."""
    rows, wide = targets.numel(), accumulator_dtype(off.dtype)
    tile = FORWARD_TILES[dtype_class(off.dtype)]
    losses = off.new_empty((rows, 3), dtype=wide)
    stats = off.new_empty((rows, STATS), dtype=wide)
    run(
        distillation_fwd_kernel,
        (rows,),
        off.device,
        tile,
        off=off,
        on=on,
        targets=targets,
        losses=losses,
        stats=stats,
        T=max(1, off.shape[1]),
        V=off.shape[2],
        **named_strides("off", "ntv", strides(off)),
        **named_strides("on", "ntv", strides(on)),
        TEMPERATURE=temperature,
        HAS_ON=on is not None,
        BLOCK_V=tile.cols,
        ACC=accumulator(off.dtype),
    )
    return losses.sum(0, dtype=torch.float64).to(wide), stats


def backward(
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    scales: torch.Tensor,
    learns: tuple[bool, bool],
    d_off: torch.Tensor | None,
    d_on: torch.Tensor | None,
) -> None:
    """See `Kernels`."""
    tile = BACKWARD_TILES[dtype_class(off.dtype)]
    vocabulary = off.shape[2]
    run(
        distillation_bwd_kernel,
        (targets.numel(), -(-vocabulary // tile.cols)),
        off.device,
        tile,
        off=off,
        on=on,
        targets=targets,
        stats=stats,
        scales=scales,
        d_off=d_off,
        d_on=d_on,
        T=max(1, off.shape[1]),
        V=vocabulary,
        **named_strides("off", "ntv", strides(off)),
        **named_strides("on", "ntv", strides(on)),
        **named_strides("d_off", "ntv", strides(d_off)),
        **named_strides("d_on", "ntv", strides(d_on)),
        TEMPERATURE=temperature,
        HAS_ON=on is not None,
        OFF_LEARNS=learns[0],
        ON_LEARNS=learns[1],
        NEED_OFF=d_off is not None,
        NEED_ON=d_on is not None,
        BLOCK_V=tile.cols,
        ACC=accumulator(off.dtype),
    )


def forward_and_overwrite(
    off: torch.Tensor,
    on: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    scales: torch.Tensor,
    learns: tuple[bool, bool],
    needs: tuple[bool, bool],
) -> torch.Tensor:
    """See `Kernels`."""
    sums, stats = forward(off, on, targets, temperature)
    results = (off if needs[0] else None, on if needs[1] else None)
    backward(off, on, targets, stats, temperature, scales, learns, *results)
    return sums
