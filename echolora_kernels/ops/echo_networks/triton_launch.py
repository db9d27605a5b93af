"""The two passes by Triton kernels: two launches forward, two backward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..echo_lora_linear.configs import Tile
from ..echo_lora_linear.launch import accumulator, input_precision, run
from ..echo_lora_linear.rows import accumulator_dtype
from .triton_kernels import (
    networks_down_fwd_kernel,
    networks_sum_bwd_kernel,
    networks_up_bwd_kernel,
    networks_up_fwd_kernel,
)

MAX_BOTTLENECK = 256
SAMPLES = 16  # the least that a matrix instruction takes, and more than most batches have
DOWN = Tile(SAMPLES, 32, 32, 4, 4)


def forward(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta and H; see `passes`."""
    (n, k), hidden, (total, m) = u.shape, down.shape[0], proj_up.shape
    arithmetic = {"ACC": accumulator(u.dtype), "PRECISION": input_precision(u.dtype)}
    h = u.new_empty((n, hidden), dtype=accumulator_dtype(u.dtype))
    delta = u.new_empty(n * total)
    batches = triton.cdiv(n, SAMPLES)
    blocks = {"BLOCK_N": DOWN.rows, "BLOCK_H": DOWN.cols, "BLOCK_K": DOWN.inner}
    tensors = {"u": u, "down": down, "h": h}
    grid = (triton.cdiv(hidden, DOWN.cols), batches)
    run(networks_down_fwd_kernel, grid, u.device, DOWN, **tensors, N=n, K=k, HIDDEN=hidden, **blocks, **arithmetic)
    parts = Parts.of(widths, m)
    tensors = {"h": h, "proj_up": proj_up, "gate_up": gate_up, "gate_bias": gate_bias, "scale": scale, "delta": delta}
    grid = (parts.count, batches)
    run(networks_up_fwd_kernel, grid, u.device, parts.tile, **tensors, N=n, M=m, **parts.constants, **arithmetic)
    return delta, h


def backward(
    ddelta: torch.Tensor,
    h: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of u down^T, proj_up, gate_up, gate_bias and scale; see `passes`."""
    n, m = h.shape[0], proj_up.shape[1]
    da = ddelta.new_empty(h.shape)
    dproj_up, dgate_up, dgate_bias, dscale = map(torch.empty_like, (proj_up, gate_up, gate_bias, scale))
    if n == 0:
        return da, dproj_up.zero_(), dgate_up.zero_(), dgate_bias.zero_(), dscale.zero_()
    parts = Parts.of(widths, m)
    sums = {"dh_parts": h.new_empty((parts.count, n, 2, m)), "dscale_parts": h.new_empty(parts.count)}
    tensors = {
        "ddelta": ddelta, "h": h, "proj_up": proj_up, "gate_up": gate_up, "gate_bias": gate_bias, "scale": scale,
        "dproj_up": dproj_up, "dgate_up": dgate_up, "dgate_bias": dgate_bias,
    }  # fmt: skip
    acc, precision = accumulator(ddelta.dtype), input_precision(ddelta.dtype)
    constants = {**parts.constants, "ACC": acc, "PRECISION": precision}
    run(networks_up_bwd_kernel, (parts.count,), h.device, parts.tile, **tensors, **sums, N=n, M=m, **constants)
    tensors = {"h": h, "da": da, "dscale": dscale}
    firsts = parts.constants["PARTS"]
    constants = {"COUNT": len(widths), "PARTS": firsts, "ENDS": (*firsts[1:], parts.count)}
    constants |= {"BLOCK_P": 16, "BLOCK_M": parts.tile.inner, "ACC": acc}
    grid = (2 * len(widths), n)
    run(networks_sum_bwd_kernel, grid, h.device, parts.tile, **tensors, **sums, N=n, M=m, **constants)
    return da, dproj_up, dgate_up, dgate_bias, dscale


@dataclass(frozen=True)
class Parts:
    """The up-projections of all modules cut into blocks of rows, one for each program.

    Args:
        count: of programs. tile: samples, rows of a block, and m as a power of two.
        constants: what tells a program which rows of which module it has.
    """

    count: int
    tile: Tile
    constants: dict[str, Any]

    @classmethod
    def of(cls, widths: Sequence[int], m: int) -> Parts:
        inner = max(16, triton.next_power_of_2(m))
        rows = max(16, min(32, 1024 // inner))  # two blocks of weights and their gradients fit the registers
        counts = [triton.cdiv(width, rows) for width in widths]
        firsts, starts = (tuple(itertools.accumulate(sizes, initial=0)) for sizes in (counts, widths))
        constants = {"COUNT": len(widths), "PARTS": firsts[:-1], "STARTS": starts[:-1], "WIDTHS": tuple(widths)}
        constants |= {"BLOCK_N": SAMPLES, "BLOCK_C": rows, "BLOCK_M": inner}
        return cls(firsts[-1], Tile(SAMPLES, rows, inner, 8, 1), constants)
