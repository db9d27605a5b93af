"""Plain PyTorch loss of an Echo-LoRA step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
KD_DETACH = ("on", "none", "off")


class EchoLosses(NamedTuple):
    """The total and its parts, scalars in float32 or wider; loss_on and loss_kd are None on an unrouted step."""

    loss: torch.Tensor
    loss_off: torch.Tensor
    loss_on: torch.Tensor | None
    loss_kd: torch.Tensor | None


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
    """The loss of one step; see `echolora_kernels.losses.echo_distillation` for formulas, shapes and errors."""
    _check_tensors(logits_off, logits_on, labels)
    _check_choices(temperature, kd_weight, kd_detach, num_items)
    targets = labels[:, 1:]
    rows = targets != IGNORE_INDEX  # Q: position t predicts the label at t + 1
    targets = targets[rows]
    divisor = _divisor(len(targets) if num_items is None else num_items)

    off = _upcast(logits_off[:, :-1][rows])
    loss_off = F.cross_entropy(off, targets, reduction="sum") / divisor
    if logits_on is None:
        return EchoLosses(loss_off, loss_off, None, None)

    on = _upcast(logits_on[:, :-1][rows])
    loss_on = F.cross_entropy(on, targets, reduction="sum") / divisor
    teacher = on.detach() if kd_detach == "on" else on
    student = off.detach() if kd_detach == "off" else off
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    loss_kd = temperature**2 * divergence / divisor
    return EchoLosses(loss_off + loss_on + kd_weight * loss_kd, loss_off, loss_on, loss_kd)


def _divisor(num_items: int | torch.Tensor) -> int | torch.Tensor:
    """At least 1: without a supervised token the sums are 0 already."""
    return num_items.clamp_min(1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_tensors(logits_off: torch.Tensor, logits_on: torch.Tensor | None, labels: torch.Tensor) -> None:
    for name, logits in (("logits_off", logits_off), ("logits_on", logits_on)):
        if logits is None:
            continue
        if logits.ndim != 3 or not logits.is_floating_point():
            raise ValueError(f"{name}: got {tuple(logits.shape)} of {logits.dtype}, wants floating [N, T, V]")
        if logits.shape != logits_off.shape:
            raise ValueError(f"{name}: got shape {tuple(logits.shape)}, wants {tuple(logits_off.shape)} as logits_off")
    if tuple(labels.shape) != tuple(logits_off.shape[:2]):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, wants {tuple(logits_off.shape[:2])}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, wants torch.int64")
    for name, tensor in (("logits_on", logits_on), ("labels", labels)):
        if tensor is not None and tensor.device != logits_off.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {logits_off.device} as logits_off")


def _check_choices(temperature: float, kd_weight: float, kd_detach: str, num_items: int | torch.Tensor | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wants more than 0 and finite")
    if not 0 <= kd_weight < math.inf:
        raise ValueError(f"kd_weight: got {kd_weight}, wants 0 or more and finite")
    if kd_detach not in KD_DETACH:
        raise ValueError(f"kd_detach: got {kd_detach!r}, wants one of {', '.join(map(repr, KD_DETACH))}")
    if isinstance(num_items, int) and num_items < 0:  # a tensor is not looked at: that would wait for its device
        raise ValueError(f"num_items: got {num_items}, wants 0 or more")
