"""Trials of the losses."""

from __future__ import annotations

from typing import Any

import torch

from .. import losses
from ..ops.echo_distillation import reference
from ..ops.echo_distillation.result import IGNORE_INDEX, EchoLosses
from .layers import drawer
from .trials import Compute, Tensors, Trial


def loss(
    operator: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    vocabulary: int,
    *,
    routed: bool = True,
    near: float = 1.0,
    width: int = 0,
    **options: Any,
) -> Trial:
    """One of the three losses; every third row has no target.

    Args:
        shape: of the labels or targets. width: of the hidden states, for `echo_distillation_linear`.
        near: how far ON is from OFF. options: of the loss.
    """
    draw = drawer(device, torch.float64)
    off = draw(*shape, width or vocabulary) * (1 if width else 3)
    tensors = {"off": off.to(dtype)}
    if routed:
        tensors["on"] = (off + near * draw(*off.shape)).to(dtype)
    if width:
        tensors["weight"] = (draw(vocabulary, width) * 0.7).to(dtype)
        tensors["bias"] = draw(vocabulary).to(dtype)
    targets = torch.randint(vocabulary, shape)
    targets.view(-1)[::3] = IGNORE_INDEX
    targets = targets.to(device)

    def by(function: Any, **chosen: Any) -> Compute:
        def compute(tensors: Tensors) -> Tensors:
            branches = (tensors["off"], tensors.get("on"))
            head = {"bias": tensors["bias"]} if width else {}
            weight = (tensors["weight"],) if width else ()
            found: EchoLosses = function(*branches, *weight, targets, **head, **options, **chosen)
            # the divergence of near branches is a small difference: its error would hide those of the others
            parts = {"losses loss": found.loss, "losses off": found.loss_off, "losses on": found.loss_on}
            return {name: part for name, part in {**parts, "loss_kd": found.loss_kd}.items() if part is not None}

        return compute

    kernels, plain = by(getattr(losses, operator), backend=backend), by(getattr(reference, operator))
    return Trial(tensors, frozenset(("weight", "bias")), {"losses loss": torch.ones((), device=device)}, kernels, plain)
