"""Adapted linears on a 4-bit base of bitsandbytes: PEFT's layer, and the same one fused."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..integrations.fuse import fuse
from ..integrations.quantised import dequantised_rows
from . import floor
from .baselines import adapted_by_peft
from .cases import Case
from .layers import Layer, Truth, draw
from .problem import OTHERS_LIMIT, Implementation, Problem, why_no


def build(case: Case, device: torch.device) -> Problem:
    """The quantised linear alone, and with float32 adapters of PEFT, as QLoRA has them; right is what its dequantised
    weight gives.
    """
    for package in ("bitsandbytes", "peft"):
        if (reason := why_no(package)) is not None:
            return Problem(None, {}, {"all": reason})
    layer = draw(case, device)
    weight = layer.projections[0].weight
    stored = torch.cat([*dequantised_rows(_quantised(weight))]).to(weight)
    layer = replace(layer, projections=[replace(layer.projections[0], weight=stored)])
    layer, truth = layer.to(weight.dtype, torch.float32), Truth(layer)
    found = {"quantised": _alone(layer, weight)}
    found["peft"] = _adapted(layer, weight, truth)
    found["ours"] = _adapted(layer, weight, truth, fused=True)
    assert case.d_in is not None and case.rank is not None
    rows = layer.x.shape[:-1].numel()
    stages = floor.layer(
        rows, case.d_in, case.widths, case.rank, dora=case.method == "dora", dropout=0.0, itemsize=weight.element_size(),
        weight_size=0.5,  # four bits, and its scales are less than a twentieth more
    )  # fmt: skip
    return Problem("quantised", found, {}, stages)


def _quantised(weight: torch.Tensor) -> Any:
    """bitsandbytes' linear with that weight in NF4."""
    linear = importlib.import_module("bitsandbytes").nn.Linear4bit(
        *weight.shape[::-1], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    linear.load_state_dict({"weight": weight.float()})
    return linear.to(weight.device)


def _alone(layer: Layer, weight: torch.Tensor) -> Implementation:
    x, linear = layer.x.detach().requires_grad_(), _quantised(weight)
    return Implementation(lambda: [linear(x)], {"x": x}, layer.incoming, None)


def _adapted(layer: Layer, weight: torch.Tensor, truth: Truth, fused: bool = False) -> Implementation:
    layer = layer.to(weight.dtype, torch.float32)
    base = nn.Sequential(_quantised(weight))
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    module, leaves = adapted_by_peft(base, layer.projections[0], layer.dropout)
    if fused:
        fuse(module, strict=True)
    expected = functools.partial(truth.expected, torch.float32, None)
    # the base product is the library's own either way
    return Implementation(
        lambda: [module(layer.x)], {"x": layer.x, **leaves}, layer.incoming, expected, limit=OTHERS_LIMIT
    )
