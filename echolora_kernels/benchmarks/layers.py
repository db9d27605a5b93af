"""The adapted linears: arguments at the scale of a trained layer's, what is right, and our implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .. import functional
from ..backends import running_on
from ..ops.echo_lora_linear import Echo, Projection
from ..ops.echo_lora_linear.reference import project
from ..verification.layers import kept
from . import baselines, floor
from .cases import DTYPES, Case
from .check import SEED
from .problem import OTHERS_LIMIT, Implementation, Problem, Tensors

_SAMPLES = 8
_ANSWER = 0.125  # of the positions receive the echo
_SCALING = 2.0

Masks = list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """x [N, T, d_in], the projections of it, the gradients of their outputs, and the probability of dropout."""

    x: torch.Tensor
    projections: list[Projection]
    incoming: list[torch.Tensor]
    dropout: float

    def leaves(self) -> Tensors:
        """What gets a gradient, by name; a projection's have its number."""
        found = {"x": self.x}
        for index, p in enumerate(self.projections):
            own = {"lora_a": p.lora_a, "lora_b": p.lora_b, "magnitude": p.magnitude}
            own["delta"] = None if p.echo is None else p.echo.delta
            found |= {f"{name}{index}": leaf for name, leaf in own.items() if leaf is not None}
        return found

    def to(self, dtype: torch.dtype, adapters: torch.dtype) -> Layer:
        """The same numbers in other dtypes; what gets a gradient is new, the rest is shared where it can be."""

        def leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_()

        projections = [
            replace(
                p,
                weight=p.weight.to(dtype),
                lora_a=leaf(p.lora_a, adapters),
                lora_b=leaf(p.lora_b, adapters),
                magnitude=None if p.magnitude is None else leaf(p.magnitude, adapters),
                echo=None if p.echo is None else Echo(leaf(p.echo.delta, dtype), p.echo.mask),
            )
            for p in self.projections
        ]
        return Layer(leaf(self.x, dtype), projections, [dy.to(dtype) for dy in self.incoming], self.dropout)

    def plain(self, masks: Masks | None) -> Tensors:
        """Results and gradients by torch's own operators, given which elements of x each projection keeps."""
        outputs = []
        for index, p in enumerate(self.projections):
            dropped = self.x.to(p.lora_a.dtype)
            if masks is not None:
                dropped = dropped * masks[index % len(masks)].to(dropped.dtype) / (1 - self.dropout)
            outputs.append(project(self.x, dropped, p, masks is not None))
        leaves = self.leaves()
        gradients = torch.autograd.grad(outputs, list(leaves.values()), self.incoming)
        found = {f"y{index}": y.detach() for index, y in enumerate(outputs)}
        return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


class Truth:
    """What is right for a layer; without dropout it is computed once for all implementations."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._known: dict[torch.dtype, Tensors] = {}

    def expected(self, adapters: torch.dtype, masks: Callable[[], Masks] | None) -> tuple[Tensors, Tensors]:
        """By plain torch in the layer's dtype, and in float64.

        Args:
            adapters: dtype of the implementation's adapters, and so of their gradients.
            masks: replays the dropout of the check.
        """
        dtype = self.layer.x.dtype
        if self.layer.dropout == 0 or masks is None:
            plain, exact = (self._without_dropout(kind) for kind in (dtype, torch.float64))
        else:
            found = masks()
            plain, exact = (self.layer.to(kind, kind).plain(found) for kind in (dtype, torch.float64))
        wide = {name for name in exact if name.startswith(("dlora", "dmagnitude"))}
        return {name: each.to(adapters) if name in wide else each for name, each in plain.items()}, exact

    def _without_dropout(self, dtype: torch.dtype) -> Tensors:
        if dtype not in self._known:
            self._known[dtype] = self.layer.to(dtype, dtype).plain(None)
        return self._known[dtype]


def build(case: Case, device: torch.device) -> Problem:
    """Ours by every backend that runs there, in plain torch, and the peers."""
    layer = draw(case, device)
    truth = Truth(layer)
    found, absent = baselines.peers(layer, truth)
    found = {"frozen": frozen(layer), **found}
    for name, backend, adapters in _ours(layer.x):
        found[name] = ours(layer.to(layer.x.dtype, adapters), truth, backend)
    if len(layer.projections) > 1:
        for backend in running_on("echo_lora_linear", device):
            name = f"ours-{backend}-one-by-one"
            if layer.dropout:
                absent[name] = "each projection drops elements of its own, which the check of a group does not know"
            else:
                found[name] = ours(layer.to(layer.x.dtype, layer.x.dtype), truth, backend, grouped=False)
    stages = floor.layer(
        layer.x.shape[:-1].numel(),
        layer.x.shape[-1],
        case.widths,
        len(layer.projections[0].lora_a),
        dora=case.method == "dora",
        dropout=layer.dropout,
        itemsize=layer.x.element_size(),
    )
    return Problem("frozen", found, absent, stages)


def draw(case: Case, device: torch.device) -> Layer:
    """Random arguments; the same ones on every device. Adapters have the layer's dtype."""
    assert case.rank is not None and case.d_in is not None
    rows, d_in, dtype = case.rows_on(device), case.d_in, DTYPES[case.dtype]
    samples = _SAMPLES if rows % _SAMPLES == 0 else 1
    tokens = rows // samples
    mask = (torch.arange(tokens) >= tokens - max(int(tokens * _ANSWER), 1)).expand(samples, -1).to(device)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    projections, incoming = [], []
    for width in case.widths:
        weight = normal(width, d_in, scale=d_in**-0.5)
        magnitude = None
        if case.method == "dora":
            magnitude = (weight.float().norm(dim=1) * (0.9 + 0.2 * torch.rand(width).to(device))).to(dtype)
        a, b = normal(case.rank, d_in, scale=d_in**-0.5), normal(width, case.rank, scale=0.05)
        echo = Echo(normal(samples, width), mask) if case.echo else None
        projections.append(Projection(weight, None, a, b, _SCALING, magnitude, echo))
        incoming.append(normal(samples, tokens, width))
    layer = Layer(normal(samples, tokens, d_in), projections, incoming, case.dropout or 0.0)
    return layer.to(dtype, dtype)


def frozen(layer: Layer) -> Implementation:
    """The linears without adapters: the limit."""
    layer = layer.to(layer.x.dtype, layer.x.dtype)

    def forward() -> list[torch.Tensor]:
        return [F.linear(layer.x, p.weight) for p in layer.projections]

    return Implementation(forward, {"x": layer.x}, layer.incoming, None)


def _ours(x: torch.Tensor) -> list[tuple[str, str, torch.dtype]]:
    """Name, backend and dtype of the adapters of each of ours."""
    found = [("reference", "reference", x.dtype)]
    for backend in running_on("echo_lora_linear", x.device):
        found.append((f"ours-{backend}", backend, x.dtype))
        if x.dtype != torch.float32:
            found.append((f"ours-{backend}-fp32-adapters", backend, torch.float32))
    return found


def ours(layer: Layer, truth: Truth, backend: str, grouped: bool = True) -> Implementation:
    """The package's operator; that of a group where there are several projections, unless they go one by one."""
    options: dict[str, Any] = {"dropout_p": layer.dropout, "backend": backend}

    def forward() -> Sequence[torch.Tensor]:
        if grouped and len(layer.projections) > 1:
            return functional.echo_lora_linear_group(layer.x, layer.projections, **options)
        return [alone(p) for p in layer.projections]

    def alone(p: Projection) -> torch.Tensor:
        arguments = (layer.x, p.weight, p.bias, p.lora_a, p.lora_b, p.scaling)
        return functional.echo_lora_linear(*arguments, magnitude=p.magnitude, echo=p.echo, **options)

    adapters = layer.projections[0].lora_a.dtype

    def masks() -> Masks:
        if backend == "reference":
            return [baselines.kept_by(F.dropout, layer.x, adapters, layer.dropout)]
        found = kept(backend, layer.x, layer.dropout, SEED)
        assert found is not None
        return [found]

    limit = OTHERS_LIMIT if backend == "reference" else Implementation.limit
    expected = functools.partial(truth.expected, adapters, masks)
    return Implementation(forward, layer.leaves(), layer.incoming, expected, limit=limit)
