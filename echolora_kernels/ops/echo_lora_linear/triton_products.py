"""The two large products of the Triton backend, each by the candidate that `candidates` picks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from . import candidates, configs
from .candidates import Choice, Problem
from .configs import Tile
from .dropout import Dropout
from .launch import device_of, dtype_name, planned
from .projection import Projection
from .rows import add_product, flat, one_sample, without_autocast
from .triton_backward_launch import input_backward
from .triton_descriptors import describable, input_by_descriptors, linear_by_descriptors
from .triton_forward_launch import linear
from .triton_scale import scale_rows


def linear_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    delta: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout: Dropout,
    store_z: bool,
    shape: tuple[int, ...],
    choice: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """F2 by any candidate; arguments and results as those of `triton_forward_launch.linear`. None chooses `choice`."""
    rank = lora_b.shape[1]
    choice = choice or _choice("forward", x, weight, rank, gain, dropout)
    rich, two_products = gain is not None or delta is not None, gain is not None and dropout.on_base
    rest: dict[str, Any] = {
        "bias": bias,
        "gain": gain,
        "delta": delta,
        "mask": mask,
        "dropout": dropout,
        "shape": shape,
    }
    if choice.candidate == "fused":
        load = configs.forward_load(gain is not None, delta is not None, two_products)
        tile = _tile(choice, "matmul", configs.matmul_tiles(load), x)
        if tile is None and not two_products and _by_descriptors(choice, x, weight, weight.shape[0], rank):
            del rest["dropout"]
            tile = _tile(choice, "descriptor", configs.descriptor_tiles(rank, rich), x)
            return linear_by_descriptors(x, weight, s, lora_b, store_z=store_z, tile=tile, **rest)
        return linear(x, weight, s, lora_b, store_z=store_z, tile=tile, **rest)
    load = configs.forward_load(gain is not None, delta is not None, added=True)
    rest["tile"] = _tile(choice, "matmul", configs.matmul_tiles(load), x)
    with without_autocast(x):
        if choice.candidate == "accumulate":
            return linear(x, weight, s, lora_b, store_z=store_z, base=torch.mm(flat(x), weight.t()), **rest)
        y, _ = linear(x, weight, s, lora_b, contract=False, **rest)
        rows = y.view(-1, y.shape[-1])
        torch.addmm(rows, flat(x), weight.t(), out=rows)
    return y, None


def expand(
    s: torch.Tensor,
    lora_b: torch.Tensor,
    base: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    in_place: bool,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """F2 behind a finished product, base; arguments as `Kernels` says."""
    out = base if in_place else None
    # nothing is contracted, so x and weight say no more than the sizes
    return linear(
        base.unsqueeze(0), lora_b, s, lora_b, bias=bias, gain=gain, dropout=Dropout(), store_z=store_z, base=base,
        out=out,
    )  # fmt: skip


def adapter_input_gradient(
    ds: torch.Tensor, lora_a: torch.Tensor, *, dropout: Dropout, dtype: torch.dtype
) -> torch.Tensor:
    """B3 without its product; dS is rounded to x's dtype."""
    ds = ds.to(dtype)
    return input_backward(ds.unsqueeze(0), lora_a, ds, lora_a, dropout=dropout, contract=False)


def input_product(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    *,
    dropout: Dropout,
    gain: torch.Tensor | None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """B3 by any candidate; arguments and result as those of `triton_backward_launch.input_backward`.

    dS is rounded to dY's dtype, if it is wider. None chooses `choice`.
    """
    ds, rank = ds.to(dy.dtype), lora_a.shape[0]
    choice = choice or _choice("input-gradient", dy, weight, rank, gain, dropout)
    if choice.candidate == "fused":
        load = configs.input_load(rank, dropout.p > 0, gain is not None and dropout.on_base)
        tile = _tile(choice, "matmul", configs.matmul_tiles(load), dy)
        if tile is None and gain is None and _by_descriptors(choice, dy, weight, weight.shape[1], rank):
            tile = _tile(choice, "descriptor", configs.descriptor_tiles(rank, dropout.p > 0), dy)
            return input_by_descriptors(dy, weight, ds, lora_a, dropout=dropout, tile=tile)
        return input_backward(dy, weight, ds, lora_a, dropout=dropout, gain=gain, tile=tile)
    load = configs.input_load(rank, dropout.p > 0, added=True)
    tile = _tile(choice, "matmul", configs.matmul_tiles(load), dy)
    dx = input_backward(dy, weight, ds, lora_a, dropout=dropout, contract=False, tile=tile)
    return _add_product(dx, flat(dy), weight, gain)


def group_input_product(
    dys: list[torch.Tensor],
    projections: Sequence[Projection],
    ds: list[torch.Tensor],
    stacked_ds: torch.Tensor,
    *,
    gains: Sequence[torch.Tensor | None],
    dropout: Dropout,
) -> torch.Tensor:
    """B3 for projections of one input: their dX in one buffer, each added to what is there.

    Args:
        dys: [n, T, N] each. ds: [n * T, r] each, in dY's dtype; stacked_ds: all of them.
        gains: [N] or None each. dropout: as in the forward pass.

    Returns:
        dX, [n * T, K].
    """
    if dropout.on_base and any(gain is not None for gain in gains):  # each dropped part has products of its own
        dx: Any = None
        for dy, p, d, gain in zip(dys, projections, ds, gains, strict=True):
            dx = input_backward(dy, p.weight, d, p.lora_a, dropout=dropout, gain=gain, base=dx)
        return dx
    lora_a = torch.cat([p.lora_a.to(dys[0].dtype) for p in projections])
    dx = input_product(dys[0], projections[0].weight, stacked_ds, lora_a, dropout=dropout, gain=gains[0])
    for dy, p, gain in zip(dys[1:], projections[1:], gains[1:], strict=True):
        choice = _choice("input-gradient", dy, p.weight, len(p.lora_a), gain, dropout)
        # kernels with descriptors add to nothing, and those with pointers are slower than the vendor's GEMM
        if choice.candidate == "fused" and not (choice.tile or "").startswith("descriptor/"):
            input_backward(dy, p.weight, None, None, dropout=Dropout(), gain=gain, base=dx)
        else:
            _add_product(dx, flat(dy), p.weight, gain)
    return dx


def _add_product(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """`add_product` with the gain, on the smaller of the two, by a kernel that reads and writes it once."""
    if gain is not None and dy.numel() < weight.numel():
        dy = scale_rows(dy.t(), gain).t()
    elif gain is not None:
        weight = scale_rows(weight, gain)
    return add_product(dx, dy, weight, None)


def _choice(
    product: str, rows: torch.Tensor, weight: torch.Tensor, rank: int, gain: torch.Tensor | None, dropout: Dropout
) -> Choice:
    insist, folder = candidates.from_environment(product)
    n, k = weight.shape
    return chosen(
        product, rows.shape[0] * rows.shape[1], n, k, rank, dtype_name(rows.dtype),
        device_of(rows).arch, gain is not None, dropout.on_base, _plain_rows(rows), insist, folder,
        _device_name(rows.device),
    )  # fmt: skip


@planned
def chosen(
    product: str,
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: str,
    arch: str,
    dora: bool,
    dropout: bool,
    plain_rows: bool,
    insist: str | None,
    folder: str | None,
    device_name: str,
) -> Choice:
    """What `candidates.choose` says of a `Problem` with these fields on that device."""
    problem = Problem(product, m, n, k, rank, dtype, arch, dora, dropout, plain_rows)
    return candidates.choose(problem, candidates.table_for(device_name, folder), insist)


def _tile(choice: Choice, kernel: str, allowed: tuple[str, ...], rows: torch.Tensor) -> Tile | None:
    """The tile that was measured, where it is one of `kernel`'s that are allowed; None leaves it to the rule."""
    if choice.tile is None:
        return None
    return configs.named(choice.tile, kernel, allowed, rows.dtype, device_of(rows).arch)


def _by_descriptors(choice: Choice, rows: torch.Tensor, weight: torch.Tensor, width: int, rank: int) -> bool:
    """Whether the fused product, `width` columns, can and should go through tensor descriptors."""
    wanted = configs.uses_descriptors(rank, rows.dtype, device_of(rows).arch) and _plain_rows(rows)
    # making descriptors takes the host longer than it has for a small product
    m, (n, k), dtype = rows.shape[0] * rows.shape[1], weight.shape, dtype_name(rows.dtype)
    if not wanted or (choice.tile is None and candidates.brief(m, n, k, dtype)):
        return False
    return width * rows.element_size() % 16 == 0 and describable(one_sample(rows)[0], weight)


def _plain_rows(rows: torch.Tensor) -> bool:
    """Whether the vendor's GEMM reads these rows without copying them."""
    (samples, length, width), (of_sample, of_row, of_column) = rows.shape, rows.stride()
    if of_column != 1 or (samples * length > 1 and length > 1 and of_row < width):
        return False
    return samples == 1 or (of_sample == length * of_row and of_sample >= width)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
