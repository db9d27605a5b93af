"""Plain PyTorch `echo_lora_linear`: the specification every kernel is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..dora_norm.reference import dora_gain
from .checks import check_group
from .echo import Echo
from .projection import Projection


def echo_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    magnitude: torch.Tensor | None = None,
    echo: Echo | None = None,
    dora_dropout: str = "exact",
) -> torch.Tensor:
    """Linear layer with a LoRA or DoRA update and an optional echo, in plain PyTorch.

    See `echolora_kernels.functional.echo_lora_linear` for the formulas, shapes, dtypes and errors.
    """
    only = Projection(weight, bias, lora_a, lora_b, scaling, magnitude, echo)
    return echo_lora_linear_group(x, [only], dropout_p=dropout_p, dora_dropout=dora_dropout)[0]


def echo_lora_linear_group(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    dora_dropout: str = "exact",
) -> tuple[torch.Tensor, ...]:
    """Several adapted linears of one input, in plain PyTorch: one dropped input for all of them.

    See `echolora_kernels.functional.echo_lora_linear_group` for the formulas, shapes, dtypes and errors.
    """
    check_group(x, projections, dropout_p, dora_dropout)
    dropped = F.dropout(x.to(projections[0].lora_a.dtype), dropout_p)
    two_products = dropout_p > 0.0 and dora_dropout == "exact"
    return tuple(project(x, dropped, projection, two_products) for projection in projections)


def project(x: torch.Tensor, dropped: torch.Tensor, p: Projection, two_products: bool) -> torch.Tensor:
    """One projection of x, given what dropout left of it; `two_products` is DoRA's exact form."""
    injected = {} if p.echo is None else {p.echo.site: p.echo.spread()}
    adapter_input = dropped + injected["adapter_input"] if "adapter_input" in injected else dropped
    shrunk = F.linear(adapter_input.to(p.lora_a.dtype), p.lora_a)
    if "rank" in injected:
        shrunk = shrunk + injected["rank"]
    update = F.linear(shrunk.to(p.lora_b.dtype), p.lora_b) * p.scaling

    if p.magnitude is None:
        y = base = F.linear(x, p.weight, p.bias)
        y = y + update
    else:
        gain = dora_gain(p.weight, p.lora_a, p.lora_b, p.scaling, p.magnitude)
        base = F.linear(x, p.weight)
        if two_products:  # as PEFT: the DoRA correction sees the dropped input, the frozen layer does not
            y = base + (gain - 1) * F.linear(dropped, p.weight.to(dropped.dtype)) + gain * update
        else:
            y = gain * (base + update)
        if p.bias is not None:
            y = y + p.bias
    if "output" in injected:
        y = y + injected["output"]
    return y.to(base.dtype)
