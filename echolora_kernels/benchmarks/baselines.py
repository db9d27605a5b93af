"""The peers of the adapted linears: PEFT, PEFT compiled, addmm by hand, Unsloth; each on the same numbers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.echo_lora_linear import Projection
from .check import SEED
from .problem import OTHERS_LIMIT, Implementation, why_no

if TYPE_CHECKING:
    from .layers import Layer, Truth

Peers = tuple[dict[str, Implementation], dict[str, str]]


def peers(layer: Layer, truth: Truth) -> Peers:
    """Those that can run here, and name -> why each of the others cannot."""
    found: dict[str, Implementation] = {}
    absent: dict[str, str] = {}
    dtype = layer.x.dtype
    wanted: dict[str, Callable[[], Implementation]] = {
        "peft": lambda: by_peft(layer.to(dtype, torch.float32), truth),
        "peft-bf16": lambda: by_peft(layer.to(dtype, dtype), truth),
        "peft-compiled": lambda: by_peft(layer.to(dtype, dtype), truth, compiled=True),
        "addmm": lambda: by_addmm(layer.to(dtype, dtype), truth),
        "unsloth": lambda: by_unsloth(layer.to(dtype, dtype), truth),
    }
    if dtype == torch.float32:
        del wanted["peft-bf16"]  # the same as "peft"
    for name, make in wanted.items():
        reason = why_not(name, layer)
        if reason is None:
            found[name] = make()
        else:
            absent[name] = reason
    return found, absent


def why_not(name: str, layer: Layer) -> str | None:
    """Why a peer cannot compute this layer here, or None."""
    family = name.partition("-")[0]
    if family == "peft":
        if (reason := why_no("peft")) is not None:
            return reason
        return why_no_compiler(layer.x.device.type) if name == "peft-compiled" else None
    if layer.projections[0].magnitude is not None:
        return "has no DoRA of its own"
    if family == "addmm":
        return None
    return "has no dropout of its own" if layer.dropout else why_no("unsloth")


@functools.cache
def why_no_compiler(device: str) -> str | None:
    """None where torch.compile's default backend compiles for that kind of device."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler that is missing or does not fit raises
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile does not work here: {first[0]}"
    return None


def kept_by(drop: Callable[..., torch.Tensor], x: torch.Tensor, dtype: torch.dtype, p: float) -> torch.Tensor:
    """Which elements of x are kept by a `drop` that is the first to draw after the check's seed."""
    torch.manual_seed(SEED)
    return drop(torch.ones_like(x, dtype=dtype), p, True) != 0


def with_echo(y: torch.Tensor, p: Projection) -> torch.Tensor:
    """What a library without echoes does about one: adds it to the output."""
    return y if p.echo is None else y + p.echo.spread()


def by_peft(layer: Layer, truth: Truth, compiled: bool = False) -> Implementation:
    """PEFT's own layers, one after the other, on the layer's leaves."""
    modules, leaves = nn.ModuleList(), {"x": layer.x}
    for index, p in enumerate(layer.projections):
        with torch.device("meta"):
            base = nn.Linear(p.weight.shape[1], p.weight.shape[0], bias=False)
        base.weight = nn.Parameter(p.weight, requires_grad=False)
        module, own = adapted_by_peft(nn.Sequential(base), p, layer.dropout)
        modules.append(module)
        leaves |= {f"{name[:-1]}{index}": leaf for name, leaf in own.items()}
        if p.echo is not None:
            leaves[f"delta{index}"] = p.echo.delta

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        return [with_echo(module(x), p) for module, p in zip(modules, layer.projections, strict=True)]

    dtype = layer.projections[0].lora_a.dtype

    def masks() -> list[torch.Tensor]:
        torch.manual_seed(SEED)
        ones = torch.ones_like(layer.x, dtype=dtype)
        return [F.dropout(ones, layer.dropout) != 0 for _ in layer.projections]

    options: dict[str, Any] = {"limit": OTHERS_LIMIT}
    if not compiled:
        expected = functools.partial(truth.expected, dtype, masks)
        return Implementation(lambda: compute(layer.x), leaves, layer.incoming, expected, **options)
    torch._dynamo.reset()  # which otherwise gives up compiling after a few layers
    run = torch.compile(compute)

    def without_dropout() -> list[torch.Tensor]:
        modules.eval()
        try:
            return run(layer.x)
        finally:
            modules.train()

    if layer.dropout:  # compiled code draws masks of its own, which nothing else can replay
        options |= {"checked": without_dropout, "note": "checked without dropout"}
    expected = functools.partial(truth.expected, dtype, None)
    return Implementation(lambda: run(layer.x), leaves, layer.incoming, expected, **options)


def adapted_by_peft(base: nn.Sequential, p: Projection, dropout: float) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """`base`, one linear, with PEFT's adapter of p's numbers, in training mode, and its parameters by name."""
    peft: Any = importlib.import_module("peft")
    rank = len(p.lora_a)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=p.scaling * rank,
        lora_dropout=dropout,
        target_modules=["0"],
        use_dora=p.magnitude is not None,
    )
    module = peft.inject_adapter_in_model(config, base).train()
    names = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}
    leaves = {}
    for name, parameter in module.named_parameters():
        own = names.get(name.split(".")[1])
        if own is not None:
            parameter.data = getattr(p, own).detach()
            leaves[f"{own}0"] = parameter
    return module, leaves


class AddmmLoRA(torch.autograd.Function):
    """LoRA as Unsloth and Axolotl write it, less what they compute twice: products, the adapter's added in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropout: float, scalings: list[float], *tensors: torch.Tensor) -> Any:
        ctx.shape, ctx.scalings, ctx.dropout = x.shape, scalings, dropout
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        outputs, inner = [], []
        for index, scaling in enumerate(scalings):
            weight, a, b = tensors[3 * index : 3 * index + 3]
            s = torch.mm(dropped, a.t())
            outputs.append(torch.mm(rows, weight.t()).addmm_(s, b.t(), alpha=scaling))
            inner.append(s)
        ctx.save_for_backward(dropped, mask, *tensors, *inner)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        dropped, mask, *rest = ctx.saved_tensors
        count = len(ctx.scalings)
        tensors, inner = rest[: 3 * count], rest[3 * count :]
        dx = None
        added = None if mask is None else torch.zeros_like(dropped)
        gradients: list[torch.Tensor | None] = []
        for index, (dy, scaling) in enumerate(zip(dys, ctx.scalings, strict=True)):
            weight, a, b = tensors[3 * index : 3 * index + 3]
            rows = dy.reshape(-1, dy.shape[-1])
            ds = torch.mm(rows, b)
            gradients += [
                None,
                torch.mm(ds.t(), dropped).mul_(scaling),
                torch.mm(rows.t(), inner[index]).mul_(scaling),
            ]
            dx = torch.mm(rows, weight) if dx is None else dx.addmm_(rows, weight)
            (dx if added is None else added).addmm_(ds, a, alpha=scaling)
        assert dx is not None
        if added is not None:
            dx.add_(torch.ops.aten.native_dropout_backward(added, mask, 1 / (1 - ctx.dropout)))
        return (dx.view(ctx.shape), None, None, *gradients)


def by_addmm(layer: Layer, truth: Truth) -> Implementation:
    """`AddmmLoRA` on all projections, with one dropout mask."""
    scalings = [p.scaling for p in layer.projections]
    tensors = [tensor for p in layer.projections for tensor in (p.weight, p.lora_a, p.lora_b)]

    def forward() -> list[torch.Tensor]:
        outputs = AddmmLoRA.apply(layer.x, layer.dropout, scalings, *tensors)
        return [with_echo(y, p) for y, p in zip(outputs, layer.projections, strict=True)]

    def masks() -> list[torch.Tensor]:
        rows = layer.x.reshape(-1, layer.x.shape[-1])
        drop = lambda ones, p, train: torch.native_dropout(ones, p, train)[0]  # noqa: E731
        return [kept_by(drop, rows, rows.dtype, layer.dropout).view(layer.x.shape)]

    expected = functools.partial(truth.expected, layer.x.dtype, masks)
    return Implementation(forward, layer.leaves(), layer.incoming, expected, limit=OTHERS_LIMIT)


def by_unsloth(layer: Layer, truth: Truth) -> Implementation:
    """Unsloth's autograd functions: the one for q, k and v where there are three projections."""
    fast = importlib.import_module("unsloth.kernels.fast_lora")
    arguments = [[p.weight, None, p.lora_a, p.lora_b, p.scaling] for p in layer.projections]

    def forward() -> list[torch.Tensor]:
        if len(arguments) == 3:
            keep_x = False  # its default writes dX over x
            outputs = fast.LoRA_QKV.apply(layer.x, *(each for own in arguments for each in own), keep_x)
        else:
            outputs = [fast.LoRA_W.apply(layer.x, *own) for own in arguments]
        return [with_echo(y, p) for y, p in zip(outputs, layer.projections, strict=True)]

    expected = functools.partial(truth.expected, layer.x.dtype, None)
    return Implementation(forward, layer.leaves(), layer.incoming, expected, limit=OTHERS_LIMIT)
