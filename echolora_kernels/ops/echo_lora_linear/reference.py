"""Plain PyTorch `echo_lora_linear`: the specification every kernel is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..dora_norm.reference import dora_gain
from .checks import check_arguments
from .echo import Echo


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
    check_arguments(x, weight, bias, lora_a, lora_b, dropout_p, magnitude, echo, dora_dropout)
    injected = {} if echo is None else {echo.site: echo.spread()}

    dropped = F.dropout(x.to(lora_a.dtype), dropout_p)
    adapter_input = dropped + injected["adapter_input"] if "adapter_input" in injected else dropped
    shrunk = F.linear(adapter_input.to(lora_a.dtype), lora_a)
    if "rank" in injected:
        shrunk = shrunk + injected["rank"]
    update = F.linear(shrunk.to(lora_b.dtype), lora_b) * scaling

    if magnitude is None:
        y = base = F.linear(x, weight, bias)
        y = y + update
    else:
        gain = dora_gain(weight, lora_a, lora_b, scaling, magnitude)
        base = F.linear(x, weight)
        if dropout_p == 0.0 or dora_dropout == "fast":
            y = gain * (base + update)
        else:  # as PEFT: the DoRA correction sees the dropped input, the frozen layer does not
            y = base + (gain - 1) * F.linear(dropped, weight.to(dropped.dtype)) + gain * update
        if bias is not None:
            y = y + bias
    if "output" in injected:
        y = y + injected["output"]
    return y.to(base.dtype)
