"""The losses: from logits, or from hidden states and a frozen output head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import losses as operators
from ..backends import running_on
from . import floor
from .cases import DTYPES, Case
from .problem import OTHERS_LIMIT, Implementation, Problem, Tensors, why_no

Compute = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]  # states or logits and weight to the loss


@dataclass(frozen=True, eq=False)
class Branches:
    """states: OFF, and ON if the step is routed, each [rows, d], or logits [rows, V]; weight: the head [V, d]."""

    states: list[torch.Tensor]
    weight: torch.Tensor

    def to(self, dtype: torch.dtype) -> Branches:
        """The same numbers in another dtype, as new leaves."""
        states = [state.detach().to(dtype, copy=True).requires_grad_() for state in self.states]
        return Branches(states, self.weight.to(dtype))

    def leaves(self) -> Tensors:
        return dict(zip(("off", "on"), self.states, strict=False))

    def results(self, compute: Compute) -> Tensors:
        loss = compute(self.states, self.weight)
        gradients = torch.autograd.grad(loss, self.states)
        found = {f"d{name}": gradient for name, gradient in zip(self.leaves(), gradients, strict=True)}
        return {"y0": loss.detach(), **found}


def build(case: Case, device: torch.device) -> Problem:
    """Plain torch, ours, and Liger where there is a head and one branch."""
    assert case.rows is not None and case.d_in is not None
    dtype, hidden, routed = DTYPES[case.dtype], "hidden" in case.options, case.part == "routed"
    rows, width, (vocabulary,) = case.rows, case.d_in, case.widths
    weight = (3 * torch.randn(vocabulary, width) / width**0.5).to(device, dtype)
    off = torch.randn(rows, width)
    on = off + 0.2 * torch.randn(rows, width)  # differs a little from OFF, as an echo lets it
    states = [state.to(device, dtype) for state in ((off, on) if routed else (off,))]
    if not hidden:
        states = [F.linear(state, weight) for state in states]
    branches = Branches(states, weight)
    targets = torch.randint(vocabulary, (rows,)).to(device)

    def from_logits(backend: str) -> Compute:
        return lambda logits, _: operators.echo_distillation_rows(*_both(logits), targets, backend=backend).loss

    def with_head(backend: str) -> Compute:
        return lambda states, weight: from_logits(backend)([F.linear(state, weight) for state in states], weight)

    def fused(backend: str) -> Compute:
        of = operators.echo_distillation_linear
        return lambda states, weight: of(*_both(states), weight, targets, backend=backend).loss

    plain = (with_head if hidden else from_logits)("reference")
    known: dict[torch.dtype, Tensors] = {}

    def expected() -> tuple[Tensors, Tensors]:
        for kind in (dtype, torch.float64):
            if kind not in known:
                known[kind] = branches.to(kind).results(plain)
        return known[dtype], known[torch.float64]

    add = functools.partial(_implementation, branches, dtype, expected)
    found = {"products": _products(branches, dtype)} if hidden else {}
    found["reference"] = add(plain, OTHERS_LIMIT)
    absent = {}
    for backend in running_on("echo_distillation_rows", device):
        if hidden:
            found[f"linear+{backend}"] = add(with_head(backend))
        found[f"ours-{backend}"] = add((fused if hidden else from_logits)(backend))
    if hidden:
        if reason := _why_no_liger(device, routed):
            absent["liger"] = reason
        else:
            found["liger"] = add(_by_liger(targets), OTHERS_LIMIT)
    stages = floor.loss(rows, width, vocabulary, len(states), weight.element_size(), hidden)
    return Problem("products" if hidden else "reference", found, absent, stages)


def _both(branches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return branches[0], branches[1] if len(branches) > 1 else None


def _implementation(
    branches: Branches,
    dtype: torch.dtype,
    expected: Callable[[], tuple[Tensors, Tensors]],
    compute: Compute,
    limit: float = Implementation.limit,
) -> Implementation:
    own = branches.to(dtype)
    forward = lambda: [compute(own.states, own.weight)]  # noqa: E731
    return Implementation(forward, own.leaves(), None, expected, limit=limit)


def _products(branches: Branches, dtype: torch.dtype) -> Implementation:
    """What the head costs whatever the loss is: logits of both branches in one product, and back."""
    states = torch.cat(branches.states).to(dtype).requires_grad_()
    incoming = torch.ones(len(states), 1, dtype=dtype, device=states.device).expand(-1, len(branches.weight))
    return Implementation(
        lambda: [F.linear(states, branches.weight)], {"states": states}, [incoming.contiguous()], None
    )


def _why_no_liger(device: torch.device, routed: bool) -> str | None:
    if routed:
        return "has no loss of both branches"
    return why_no("liger_kernel") if device.type == "cuda" else "runs on GPUs alone"


def _by_liger(targets: torch.Tensor) -> Compute:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda states, weight: loss(weight, states[0], targets)
