"""Trials of the adapted linears, alone and in groups, of low-rank updates, and of the echo networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import functional
from ..ops.echo_lora_linear import Echo, Projection
from ..ops.echo_lora_linear.dropout import Dropout
from ..ops.echo_lora_linear.kernels import load
from ..ops.echo_lora_linear.reference import project
from ..ops.echo_networks.reference import echo_networks
from ..ops.lora_update.reference import lora_update
from .trials import Compute, Tensors, Trial

_NAMES = ("weight", "bias", "lora_a", "lora_b", "magnitude", "delta")


@dataclass(frozen=True)
class Member:
    """One projection: its sizes and options."""

    d_out: int
    r: int
    site: str | None = None
    dora: bool = False
    bias: bool = True
    scaling: float = 0.7


def drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A function from a shape to normal numbers, the same ones on every device."""
    return lambda *shape: torch.randn(shape, dtype=torch.float64).to(device, dtype)


def linears(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    t: int,
    d_in: int,
    members: Sequence[Member],
    dropout_p: float = 0.0,
    dora_dropout: str = "exact",
) -> Trial:
    """`echo_lora_linear` of one member, `echo_lora_linear_group` of several."""
    draw = drawer(device, dtype)
    mask = (torch.rand(n, t) < 0.5).to(device)
    tensors, incoming = {"x": draw(n, t, d_in)}, {}
    for number, member in enumerate(members):
        own = {
            "weight": draw(member.d_out, d_in),
            "lora_a": draw(member.r, d_in),
            "lora_b": draw(member.d_out, member.r),
        }
        if member.bias:
            own["bias"] = draw(member.d_out)
        if member.dora:
            own["magnitude"] = draw(member.d_out)
        if member.site is not None:
            width = {"output": member.d_out, "adapter_input": d_in, "rank": member.r}[member.site]
            own["delta"] = draw(n, width)
        tensors |= {_key(name, number, members): tensor for name, tensor in own.items()}
        incoming[_key("y", number, members)] = draw(n, t, member.d_out)
    seed = int(torch.randint(2**31, ()))
    keep = kept(backend, tensors["x"], dropout_p, seed)

    def projections(tensors: Tensors) -> list[Projection]:
        found = []
        for number, member in enumerate(members):
            own = {name: tensors.get(_key(name, number, members)) for name in _NAMES}
            delta = own.pop("delta")
            echo = None if member.site is None or delta is None else Echo(delta, mask, member.site)
            arguments: dict[str, Any] = {**own, "scaling": member.scaling, "echo": echo}
            found.append(Projection(**arguments))
        return found

    def kernels(tensors: Tensors) -> Tensors:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"dropout_p": dropout_p, "dora_dropout": dora_dropout, "backend": backend}
        x, several = tensors["x"], projections(tensors)
        if len(several) > 1:
            return named(functional.echo_lora_linear_group(x, several, **options))
        p = several[0]
        arguments = (x, p.weight, p.bias, p.lora_a, p.lora_b, p.scaling)
        return {"y": functional.echo_lora_linear(*arguments, magnitude=p.magnitude, echo=p.echo, **options)}

    def plain(tensors: Tensors) -> Tensors:
        x = tensors["x"]
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - dropout_p)
        two_products = dropout_p > 0 and dora_dropout == "exact"
        return named(project(x, dropped, p, two_products) for p in projections(tensors))

    def named(outputs: Iterable[torch.Tensor]) -> Tensors:
        return {_key("y", number, members): y for number, y in enumerate(outputs)}

    frozen = frozenset(_key("weight", number, members) for number in range(len(members)))
    return Trial(tensors, frozen, incoming, kernels, plain)


def updates(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    t: int,
    d_in: int,
    d_out: int,
    r: int,
    gain: bool,
    dropout_p: float,
) -> Trial:
    """`lora_update`."""
    draw = drawer(device, dtype)
    tensors = {
        "base": draw(n, t, d_out),
        "x": draw(n, t, d_in),
        "lora_a": draw(r, d_in),
        "lora_b": draw(d_out, r),
        "bias": draw(d_out),
    }
    if gain:
        tensors["gain"] = draw(d_out)
    incoming = {"y": draw(n, t, d_out)}
    seed = int(torch.randint(2**31, ()))
    keep = kept(backend, tensors["x"], dropout_p, seed)

    def kernels(tensors: Tensors) -> Tensors:
        torch.manual_seed(seed)
        arguments: dict[str, Any] = {**tensors, "scaling": 0.7}
        return {"y": functional.lora_update(**arguments, dropout_p=dropout_p, backend=backend)}

    def plain(tensors: Tensors) -> Tensors:
        x = tensors["x"]
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - dropout_p)
        arguments: dict[str, Any] = {**tensors, "x": dropped, "scaling": 0.7}
        return {"y": lora_update(**arguments)}

    return Trial(tensors, frozenset(), incoming, kernels, plain)


def _key(name: str, number: int, members: Sequence[Member]) -> str:
    return name if len(members) == 1 else f"{name}{number}"


def kept(backend: str, x: torch.Tensor, p: float, seed: int) -> torch.Tensor | None:
    """Which elements of x the backend keeps after `seed`, read off its product of ones with the identity."""
    if p == 0:
        return None
    torch.manual_seed(seed)
    dropout = Dropout.draw(p, x.device)
    identity = torch.eye(x.shape[-1], device=x.device)
    ones = torch.ones_like(x, dtype=torch.float32).flatten(0, -2).unsqueeze(0)
    kernels = load(backend)
    parts = [kernels.shrink(ones, rows, 1.0, dropout=dropout) for rows in identity.split(kernels.max_rank)]
    return (torch.cat(parts, 1) != 0).view(x.shape)


def networks(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, d: int, m: int, widths: Sequence[int]
) -> Trial:
    """`echo_networks`, with sums of about 1."""
    draw = drawer(device, dtype)
    total, count = sum(widths), len(widths)
    tensors = {
        "u": draw(n, d),
        "down": draw(2 * count * m, d) / d**0.5,
        "proj_up": draw(total, m) / m**0.5,
        "gate_up": draw(total, m) / m**0.5,
        "gate_bias": draw(total),
        "scale": draw(count),
    }

    def by(function: Callable[..., Sequence[torch.Tensor]], **options: str) -> Compute:
        return lambda tensors: {"delta": torch.cat(list(function(*tensors.values(), widths, **options)), 1)}

    kernels, plain = by(functional.echo_networks, backend=backend), by(echo_networks)
    return Trial(tensors, frozenset(), {"delta": draw(n, total)}, kernels, plain)
