"""Everything between a tensor and a Triton launch: device guard, constants, precision, partial sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends import interpreting
from ...errors import BackendUnavailable
from .configs import Device, Tile
from .dropout import Dropout

# how many sizes of each launch are remembered; a sequence length that never came before costs some microseconds
PLANS = 4096
planned: Callable[[Callable], Any] = functools.lru_cache(PLANS)
_hooks = triton.knobs.runtime
# what a plan knows of a tensor: shape, strides, dtype
Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Launch:
    """A launch but for its tensors, made once for all calls with the same sizes.

    Triton's own dispatch looks at every argument anew, which takes longer than most kernels of a small layer.

    Args:
        kernel, grid, tile: what to launch.
        blocks: the block shape of each tensor that the kernel takes as a tensor descriptor.
        constants: every argument that is no tensor.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        tile: Tile,
        blocks: Mapping[str, list[int]] | None = None,
        /,
        **constants: Any,
    ) -> None:
        self.kernel, self.tile = kernel, tile
        self._constants, self._blocks = constants, blocks or {}
        self._grid = (*grid, 1, 1)[:3]
        self._values = [constants.get(name) for name in kernel.arg_names]
        self._places = {name: place for place, name in enumerate(kernel.arg_names)}
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def run(self, device: torch.device, **tensors: torch.Tensor | None) -> None:
        """Launch on `device`'s current stream; nothing happens where the grid is empty."""
        if 0 not in self._grid:
            with _on(device):
                self._run(device, tensors)

    def arguments(self, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
        """All that the kernel takes, by name."""
        return {**self._constants, **tensors, **self._descriptors(tensors)}

    def _descriptors(self, tensors: Mapping[str, Any]) -> dict[str, TensorDescriptor]:
        return {name: TensorDescriptor.from_tensor(tensors[name], block) for name, block in self._blocks.items()}

    def _run(self, device: torch.device, tensors: dict[str, torch.Tensor | None]) -> None:
        # addresses instead of tensors, which the launcher would ask for theirs
        values = self._values.copy()
        key: list[Any] = [device.index]
        for name, tensor in tensors.items():
            if tensor is None:
                key.append(None)
                continue
            values[self._places[name]] = address = tensor.data_ptr()
            key += tensor.dtype, not address & 15  # all that the compiler is told of it
        compiled = self._compiled.get(tuple(key))
        if compiled is None:
            compiled = self.kernel[self._grid](**self.arguments(tensors), **options(self.tile))
            if isinstance(self.kernel, triton.JITFunction):  # the interpreter compiles nothing
                self._compiled[tuple(key)] = compiled
            return
        if self._blocks:
            for name, value in self._descriptors(tensors).items():
                values[self._places[name]] = value
        # as Triton's dispatch ends; of hooks, empty chains would be called too
        stream, enter, leave = _stream()(device.index), _hook(_hooks.launch_enter_hook), _hook(_hooks.launch_exit_hook)
        metadata = compiled.launch_metadata(self._grid, stream, *values) if enter or leave else None
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *values
        )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """On `device`, where launches are not there already."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


@functools.cache
def _stream() -> Callable[[int], int]:
    """What tells the current stream of a device."""
    return triton.runtime.driver.active.get_current_stream


def _hook(chain: Any) -> Any:
    """The hooks, or None where there are none."""
    return chain if getattr(chain, "calls", True) else None


def options(tile: Tile) -> dict[str, Any]:
    """What the compiler is told beside the arguments."""
    # the compiler's default for fused multiply-add differs between Triton releases
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def kind(tensor: torch.Tensor) -> Kind:
    """What a plan knows of `tensor`."""
    return tensor.shape, tensor.stride(), tensor.dtype


def strides(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    """A tensor's strides, where there is one."""
    return None if tensor is None else tensor.stride()


def run(kernel: Any, grid: Sequence[int], device: torch.device, tile: Tile, **arguments: Any) -> None:
    """Launch `kernel` on `device`'s current stream; nothing happens where the grid is empty."""
    if 0 not in grid:
        with _on(device):
            kernel[tuple(grid)](**arguments, **options(tile))


def named_strides(tensor: str, axes: str, values: Sequence[int] | None) -> dict[str, int]:
    """A tensor's strides as the kernels take them, one name an axis; 0 where there is no tensor."""
    values = values or (0,) * len(axes)
    return {f"stride_{tensor}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def echo_strides(delta: tuple[int, ...] | None, mask: tuple[int, ...] | None) -> dict[str, int]:
    """Those of Delta [n, width] and its mask [n, T]."""
    return {**named_strides("delta", "nd", delta), **named_strides("mask", "nt", mask)}


def dropout_constants(p: float) -> dict[str, Any]:
    """The compile-time arguments of a kernel that replays dropout with this probability."""
    dropout = Dropout(p)
    return {"DROPOUT": dropout.p > 0, "DROP_BELOW": dropout.drop_below, "KEEP_SCALE": dropout.keep_scale}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """As tables and rules name it."""
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that kernels accumulate in, `rows.accumulator_dtype` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32: as torch is set to, by any of its switches."""
    # torch.get_float32_matmul_precision raises where a newer switch than its own was used, or says what no longer holds
    rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded and not torch.version.hip else "ieee"


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
