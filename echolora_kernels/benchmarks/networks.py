"""The echo networks of all target modules: one module after the other, on flat parameters, and by the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import functional
from ..backends import running_on
from . import floor
from .cases import DTYPES, Case
from .problem import OTHERS_LIMIT, Implementation, Problem, Tensors

_BOTTLENECK = 64
_NAMES = ("down", "proj_up", "gate_up", "gate_bias", "scale")


def build(case: Case, device: torch.device) -> Problem:
    """Gradients of all parameters, given one of each module's Delta."""
    assert case.rows is not None and case.d_in is not None
    samples, d, widths, dtype = case.rows, case.d_in, case.widths, DTYPES[case.dtype]
    total, m = sum(widths), _BOTTLENECK
    shapes = [(samples, d), (2 * len(widths) * m, d), (total, m), (total, m), (total,), (len(widths),)]
    u, *parameters = ((torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes)
    incoming = [torch.randn(samples, width).to(device, dtype) for width in widths]

    def flat(backend: str, limit: float) -> Implementation:
        leaves = {name: each.clone().requires_grad_() for name, each in zip(_NAMES, parameters, strict=True)}
        arguments: Any = (u, *leaves.values(), widths)
        forward = lambda: functional.echo_networks(*arguments, backend=backend)  # noqa: E731
        return Implementation(forward, leaves, incoming, lambda: (_flat(results[0]), _flat(results[1])), limit=limit)

    def results_in(dtype: torch.dtype) -> Tensors:
        leaves = [each.to(dtype).requires_grad_() for each in parameters]
        arguments: Any = (u.to(dtype), *leaves, widths)
        deltas = functional.echo_networks(*arguments, backend="reference")
        gradients = torch.autograd.grad(list(deltas), leaves, [each.to(dtype) for each in incoming])
        found = {f"y{index}": delta.detach() for index, delta in enumerate(deltas)}
        return found | {name: gradient for name, gradient in zip(_NAMES, gradients, strict=True)}

    results = results_in(dtype), results_in(torch.float64)
    found = {"modules": _one_by_one(u, parameters, widths, incoming, results)}
    found["reference"] = flat("reference", OTHERS_LIMIT)
    for backend in running_on("echo_networks", device):
        found[f"ours-{backend}"] = flat(backend, Implementation.limit)
    stages = floor.networks(samples, sum(each.numel() for each in parameters), u.element_size())
    return Problem("modules", found, {}, stages)


def _flat(results: Tensors) -> Tensors:
    return {name if name.startswith("y") else f"d{name}": result for name, result in results.items()}


def _one_by_one(
    u: torch.Tensor,
    parameters: list[torch.Tensor],
    widths: tuple[int, ...],
    incoming: list[torch.Tensor],
    results: tuple[Tensors, Tensors],
) -> Implementation:
    """Each module has parameters of its own."""
    leaves = _by_module(dict(zip(_NAMES, parameters, strict=True)), widths)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}

    def forward() -> list[torch.Tensor]:
        deltas = []
        for index in range(len(widths)):
            w1, u1, w2, u2, c, scale = (leaves[f"{name} {index}"] for name in ("w1", "u1", "w2", "u2", "c", "scale"))
            gate = torch.sigmoid(F.linear(torch.tanh(F.linear(u, u1)), u2, c))
            deltas.append(scale * gate * F.linear(torch.tanh(F.linear(u, w1)), w2))
        return deltas

    def split(results: Tensors) -> Tensors:
        outputs = {name: result for name, result in results.items() if name.startswith("y")}
        return outputs | {f"d{name}": part for name, part in _by_module(results, widths).items()}

    expected = lambda: (split(results[0]), split(results[1]))  # noqa: E731
    return Implementation(forward, leaves, incoming, expected, limit=OTHERS_LIMIT)


def _by_module(flat: Tensors, widths: tuple[int, ...]) -> Tensors:
    """Flat tensors, of parameters or their gradients, in the parts that belong to each module."""
    halves = flat["down"].split(_BOTTLENECK)
    parts = {"w1": halves[::2], "u1": halves[1::2], "scale": flat["scale"].unbind()}
    parts |= {
        name: flat[whole].split(list(widths))
        for name, whole in {"w2": "proj_up", "u2": "gate_up", "c": "gate_bias"}.items()
    }
    return {f"{name} {index}": part for name, several in parts.items() for index, part in enumerate(several)}
