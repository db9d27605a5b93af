"""Plain PyTorch losses of an Echo-LoRA step; see `echolora_kernels.losses` for formulas, shapes and errors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .checks import check_choices, check_labels, check_linear, check_rows
from .result import IGNORE_INDEX, EchoLosses, combined, next_labels


def echo_distillation(
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
) -> EchoLosses:
    """The loss of one step, from logits at every position."""
    check_labels(logits_off, logits_on, labels)
    options: dict[str, Any] = {
        "temperature": temperature,
        "kd_weight": kd_weight,
        "kd_detach": kd_detach,
        "num_items": num_items,
    }
    return echo_distillation_rows(logits_off, logits_on, next_labels(labels), **options)


def echo_distillation_rows(
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
) -> EchoLosses:
    """The loss of one step, from logits of which each row predicts its target."""
    check_rows(logits_off, logits_on, targets)
    check_choices(temperature, kd_weight, kd_detach, num_items)
    rows = targets != IGNORE_INDEX  # Q
    wanted = targets[rows]

    off = _upcast(logits_off[rows])
    cross_entropy_off = F.cross_entropy(off, wanted, reduction="sum")
    if logits_on is None:
        return combined(cross_entropy_off, None, None, targets, temperature, kd_weight, num_items)

    on = _upcast(logits_on[rows])
    cross_entropy_on = F.cross_entropy(on, wanted, reduction="sum")
    log_p = F.log_softmax((on.detach() if kd_detach == "on" else on) / temperature, dim=-1)
    log_q = F.log_softmax((off.detach() if kd_detach == "off" else off) / temperature, dim=-1)
    log_ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)  # 0 log 0 = 0
    divergence = (log_p.exp() * log_ratio).sum()
    return combined(cross_entropy_off, cross_entropy_on, divergence, targets, temperature, kd_weight, num_items)


def echo_distillation_linear(
    hidden_off: torch.Tensor,
    hidden_on: torch.Tensor | None,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> EchoLosses:
    """The loss of one step, from hidden states and a frozen head; with all logits at once, whatever `chunk_rows`."""
    check_linear(hidden_off, hidden_on, weight, bias, targets, chunk_rows)
    logits_off = F.linear(hidden_off, weight, bias)
    logits_on = None if hidden_on is None else F.linear(hidden_on, weight, bias)
    options: dict[str, Any] = {
        "temperature": temperature,
        "kd_weight": kd_weight,
        "kd_detach": kd_detach,
        "num_items": num_items,
    }
    losses = echo_distillation_rows(logits_off, logits_on, targets, **options)
    return losses.only_total_differentiable()


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
