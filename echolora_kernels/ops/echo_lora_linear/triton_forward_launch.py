"""Launchers of the forward kernels of `echo_lora_linear`."""

from __future__ import annotations

import torch

from . import configs
from .configs import Device, Tile
from .dropout import Dropout
from .launch import (
    Kind,
    Launch,
    accumulator,
    device_of,
    dropout_constants,
    echo_strides,
    input_precision,
    kind,
    named_strides,
    planned,
    reduce_partials,
    strides,
)
from .rows import accumulator_dtype
from .triton_forward import linear_fwd_kernel, shrink_fwd_kernel


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
    out: torch.Tensor | None = None,
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
        out: where S goes, unit stride; for splits = 1. None makes it.
        tile, splits: launch config, and how many programs share one row's contraction; None chooses.

    Returns:
        S, [n * T, r], in x's dtype, contiguous but for `out`.
    """
    plan, splits = _shrink_plan(
        kind(x), kind(a), strides(gain), strides(delta), strides(mask), None if out is None else out.stride(0),
        float(scaling), dropout.p, site, tile, splits, device_of(x), input_precision(x.dtype),
    )  # fmt: skip
    if splits == 1:
        s = x.new_empty((x.shape[0] * x.shape[1], a.shape[0])) if out is None else out
        plan.run(x.device, x=x, a=a, gain=gain, delta=delta, mask=mask, seed=dropout.seed, s=s)
        return s
    s = x.new_empty((splits, x.shape[0] * x.shape[1], a.shape[0]), dtype=accumulator_dtype(x.dtype))
    plan.run(x.device, x=x, a=a, gain=gain, delta=delta, mask=mask, seed=dropout.seed, s=s)
    return reduce_partials(s).to(x.dtype)


@planned
def _shrink_plan(
    x: Kind,
    a: Kind,
    gain: tuple[int, ...] | None,
    delta: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    stride_s: int | None,
    scaling: float,
    dropout_p: float,
    site: str,
    tile: Tile | None,
    splits: int | None,
    device: Device,
    precision: str,
) -> tuple[Launch, int]:
    """F1's launch and its number of splits; the first two are kinds, the next three strides."""
    (samples, length, width), x_strides, dtype = x
    (rank, _), a_strides, _ = a
    rows, block_r = samples * length, configs.rank_block(rank)
    tile = tile or configs.shrink_tile(block_r, dtype, device.arch)
    splits = splits or configs.shrink_splits(tile, rows, width, device.processors)
    per_split = configs.per_split(width, tile.inner, splits)
    splits = max(1, -(-width // per_split))
    launch = Launch(
        shrink_fwd_kernel,
        (-(-rows // tile.rows), splits),
        tile,
        M=rows,
        T=max(1, length),
        K=width,
        R=rank,
        K_PER_SPLIT=per_split,
        **named_strides("x", "ntk", x_strides),
        **named_strides("a", "rk", a_strides),
        stride_gain=0 if gain is None else gain[0],
        **echo_strides(delta, mask),
        stride_s=stride_s or rank,
        SCALING=scaling,
        **dropout_constants(dropout_p),
        HAS_GAIN=gain is not None,
        SITE=site,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
    return launch, splits


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
    total, d_out = x.shape[0] * x.shape[1], weight.shape[0]
    plan = _linear_plan(
        kind(x), kind(weight), s.stride(), kind(lora_b), strides(bias), gain is not None, strides(delta), strides(mask),
        dropout.p if gain is not None and dropout.on_base else 0.0, store_z and base is None, base is not None, contract, tile,
        device_of(x), input_precision(x.dtype),
    )  # fmt: skip
    y = x.new_empty(shape or (total, d_out)) if out is None else out
    z = x.new_empty((total, d_out)) if store_z and base is None else None
    plan.run(
        x.device, x=x, w=weight, s=s, b=lora_b, bias=bias, gain=gain, delta=delta, mask=mask, seed=dropout.seed,
        base=base, y=y, z=z,
    )  # fmt: skip
    return y, base if store_z and base is not None else z


@planned
def _linear_plan(
    x: Kind,
    weight: Kind,
    s: tuple[int, ...],
    lora_b: Kind,
    bias: tuple[int, ...] | None,
    has_gain: bool,
    delta: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    dora_dropout_p: float,
    store_z: bool,
    has_base: bool,
    contract: bool,
    tile: Tile | None,
    device: Device,
    precision: str,
) -> Launch:
    """F2's launch; x, weight and lora_b are kinds, the other tensors strides."""
    (samples, length, _), x_strides, dtype = x
    (d_out, d_in), w_strides, _ = weight
    (_, rank), b_strides, _ = lora_b
    rows, block_r = samples * length, configs.rank_step(rank, dtype)
    load = configs.forward_load(has_gain, delta is not None, dora_dropout_p > 0, has_base or not contract)
    tile = tile or configs.matmul_tile(rows, d_out, dtype, device, load)
    constants = dropout_constants(dora_dropout_p)
    constants["DORA_DROPOUT"] = constants.pop("DROPOUT")
    return Launch(
        linear_fwd_kernel,
        (-(-rows // tile.rows) * -(-d_out // tile.cols),),
        tile,
        M=rows,
        T=max(1, length),
        K=d_in if contract and not has_base else 0,
        N=d_out,
        R=rank,
        **named_strides("x", "ntk", x_strides),
        **named_strides("w", "nk", w_strides),
        stride_s=s[0],
        **named_strides("b", "nr", b_strides),
        stride_bias=0 if bias is None else bias[0],
        **echo_strides(delta, mask),
        **constants,
        HAS_BASE=has_base,
        HAS_GAIN=has_gain,
        HAS_BIAS=bias is not None,
        HAS_DELTA=delta is not None,
        STORE_Z=store_z,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        RANK_STEPS=-(-rank // block_r),
        GROUP=configs.GROUP,
        ACC=accumulator(dtype),
        PRECISION=precision,
    )
