"""Argument checks of `echo_lora_linear`, shared by every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .echo import Echo
from .projection import Projection
from .rows import autocast_narrows

DORA_DROPOUTS = ("exact", "fast")


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dropout_p: float,
    magnitude: torch.Tensor | None,
    echo: Echo | None,
    dora_dropout: str,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless everything fits together."""
    _want_ndim("weight", weight, 2)
    d_out, d_in = weight.shape
    if x.ndim < 1 or x.shape[-1] != d_in:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wants [..., {d_in}], the d_in of weight")
    _want_ndim("lora_a", lora_a, 2)
    rank = lora_a.shape[0]
    if rank <= 0:
        raise ValueError(f"lora_a: got rank {rank}, wants at least 1")
    _want_shape("lora_a", lora_a, (rank, d_in))
    _want_shape("lora_b", lora_b, (d_out, rank))
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: got dtype {lora_b.dtype}, wants {lora_a.dtype} as lora_a")
    if bias is not None:
        _want_shape("bias", bias, (d_out,))
    if magnitude is not None:
        _want_shape("magnitude", magnitude, (d_out,))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, wants 0 <= dropout_p < 1")
    everything = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "magnitude": magnitude}
    for name, tensor in everything.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants a floating dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {x.device} as x")
    if dora_dropout not in DORA_DROPOUTS:
        raise ValueError(f"dora_dropout: got {dora_dropout!r}, wants one of {', '.join(map(repr, DORA_DROPOUTS))}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype and not autocast_narrows(x):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants {weight.dtype} as weight (or autocast)")
    if echo is not None:
        _check_echo(x, echo, {"output": d_out, "adapter_input": d_in, "rank": rank}[echo.site])


def check_group(x: torch.Tensor, projections: Sequence[Projection], dropout_p: float, dora_dropout: str) -> None:
    """The same for several projections of one input; with more than one, the message says which."""
    if not projections:
        raise ValueError("projections: got none, wants at least one")
    for index, p in enumerate(projections):
        try:
            check_arguments(
                x, p.weight, p.bias, p.lora_a, p.lora_b, dropout_p, p.magnitude, p.echo, dora_dropout
            )  # fmt: skip
            if p.lora_a.dtype != projections[0].lora_a.dtype:
                raise TypeError(f"lora_a: got dtype {p.lora_a.dtype}, wants {projections[0].lora_a.dtype} as the first")
        except (TypeError, ValueError) as error:
            if len(projections) == 1:
                raise
            raise type(error)(f"projections[{index}]: {error}") from error


def _check_echo(x: torch.Tensor, echo: Echo, width: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wants [n_samples, T, d_in] when an echo is given")
    if tuple(echo.mask.shape) != tuple(x.shape[:2]):
        raise ValueError(f"echo.mask: got shape {tuple(echo.mask.shape)}, wants {tuple(x.shape[:2])} as x")
    if echo.delta.shape[1] != width:
        raise ValueError(f"echo.delta: got width {echo.delta.shape[1]}, wants {width} for site {echo.site!r}")
    if echo.delta.device != x.device:
        raise ValueError(f"echo.delta: got device {echo.delta.device}, wants {x.device} as x")


def _want_ndim(name: str, tensor: torch.Tensor, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {ndim} dimensions")


def _want_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {shape}")
