"""Everything between a tensor and a Triton launch: device guard, constants, precision, partial sums."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from ...backends import interpreting
from ...errors import BackendUnavailable
from .configs import Device, Tile
from .dropout import Dropout


def run(kernel: Any, grid: Sequence[int], device: torch.device, tile: Tile, **arguments: Any) -> None:
    """Launch `kernel` on `device`'s current stream; nothing happens where the grid is empty."""
    if 0 in grid:
        return
    # the compiler's default for fused multiply-add differs between Triton releases
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[tuple(grid)](**arguments, **options)
    else:
        kernel[tuple(grid)](**arguments, **options)


def echo_arguments(delta: torch.Tensor | None, mask: torch.Tensor | None) -> dict[str, Any]:
    """Delta [n, width] and its mask [n, T] as the kernels take them; strides of 0 where there is no echo."""
    stride_delta, stride_mask = ((0, 0) if tensor is None else tensor.stride() for tensor in (delta, mask))
    return {
        "delta": delta,
        "mask": mask,
        "stride_delta_n": stride_delta[0],
        "stride_delta_d": stride_delta[1],
        "stride_mask_n": stride_mask[0],
        "stride_mask_t": stride_mask[1],
    }


def dropout_constants(dropout: Dropout) -> dict[str, Any]:
    """The compile-time arguments of a kernel that replays `dropout`."""
    return {"DROPOUT": dropout.p > 0, "DROP_BELOW": dropout.drop_below, "KEEP_SCALE": dropout.keep_scale}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that kernels accumulate in, `rows.accumulator_dtype` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32: as torch is set to (`torch.set_float32_matmul_precision`)."""
    exact = dtype != torch.float32 or torch.version.hip or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def reduce_partials(partials: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension in a fixed order."""
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def want_runnable(x: torch.Tensor, name: str = "x") -> None:
    """Raise BackendUnavailable where no Triton kernel can compute with `x`, the argument `name`."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        raise BackendUnavailable(
            f"{name}: got device {x.device}, wants a GPU for the triton backend "
            "(or a CPU tensor under TRITON_INTERPRET=1)"
        )
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        raise BackendUnavailable(
            f"{name}: got torch.bfloat16 on cpu, wants another dtype: Triton's interpreter gets it wrong"
        )


def device_of(tensor: torch.Tensor) -> Device:
    """What the config rules need to know about `tensor`'s device."""
    return _cuda_device(tensor.device.index) if tensor.device.type == "cuda" else Device("cpu", 8)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
