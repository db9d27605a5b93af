"""Argument checks of the losses, shared by every backend."""

from __future__ import annotations

import math

import torch

from ..echo_lora_linear.rows import autocast_narrows
from .result import KD_DETACH


def check_labels(logits_off: torch.Tensor, logits_on: torch.Tensor | None, labels: torch.Tensor) -> None:
    """Raise unless logits are [N, T, V] and labels [N, T]."""
    for name, logits in (("logits_off", logits_off), ("logits_on", logits_on)):
        if logits is not None and (logits.ndim != 3 or not logits.is_floating_point()):
            raise ValueError(f"{name}: got {tuple(logits.shape)} of {logits.dtype}, wants floating [N, T, V]")
    _check_rows("labels", labels, logits_off, ("logits_on", logits_on), "logits_off")


def check_rows(logits_off: torch.Tensor, logits_on: torch.Tensor | None, targets: torch.Tensor) -> None:
    """Raise unless logits are [..., V] and targets [...]."""
    for name, logits in (("logits_off", logits_off), ("logits_on", logits_on)):
        if logits is not None and (logits.ndim < 1 or not logits.is_floating_point()):
            raise ValueError(f"{name}: got {tuple(logits.shape)} of {logits.dtype}, wants floating [..., V]")
    _check_rows("targets", targets, logits_off, ("logits_on", logits_on), "logits_off")


def check_linear(
    hidden_off: torch.Tensor,
    hidden_on: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk_rows: int | None,
) -> None:
    """Raise unless hidden states are [R, d], the head [V, d] and [V], frozen, and targets [R]."""
    for name, tensor in (("hidden_off", hidden_off), ("hidden_on", hidden_on), ("weight", weight)):
        if tensor is not None and (tensor.ndim != 2 or not tensor.is_floating_point()):
            raise ValueError(f"{name}: got {tuple(tensor.shape)} of {tensor.dtype}, wants two floating dimensions")
    _check_rows("targets", targets, hidden_off, ("hidden_on", hidden_on), "hidden_off")
    vocabulary, width = weight.shape
    if hidden_off.shape[1] != width:
        raise ValueError(f"hidden_off: got shape {tuple(hidden_off.shape)}, wants [R, {width}], the d of weight")
    if bias is not None and tuple(bias.shape) != (vocabulary,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wants {(vocabulary,)}")
    for name, tensor in (("hidden_on", hidden_on), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden_off.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {hidden_off.device} as hidden_off")
        if tensor.dtype != hidden_off.dtype and not autocast_narrows(hidden_off):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wants {hidden_off.dtype} as hidden_off (or autocast)")
        if name != "hidden_on" and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got one that requires a gradient, wants a frozen head; for a trainable one call "
                "echo_distillation_rows on the logits of torch.nn.functional.linear"
            )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: got {chunk_rows}, wants at least 1 or None")


def check_choices(temperature: float, kd_weight: float, kd_detach: str, num_items: int | torch.Tensor | None) -> None:
    """Raise unless the options are what every loss takes."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wants more than 0 and finite")
    if not 0 <= kd_weight < math.inf:
        raise ValueError(f"kd_weight: got {kd_weight}, wants 0 or more and finite")
    if kd_detach not in KD_DETACH:
        raise ValueError(f"kd_detach: got {kd_detach!r}, wants one of {', '.join(map(repr, KD_DETACH))}")
    if isinstance(num_items, int) and num_items < 0:  # a tensor is not looked at: that would wait for its device
        raise ValueError(f"num_items: got {num_items}, wants 0 or more")


def _check_rows(
    name: str, targets: torch.Tensor, off: torch.Tensor, other: tuple[str, torch.Tensor | None], like: str
) -> None:
    on_name, on = other
    if on is not None and on.shape != off.shape:
        raise ValueError(f"{on_name}: got shape {tuple(on.shape)}, wants {tuple(off.shape)} as {like}")
    if targets.shape != off.shape[:-1]:
        raise ValueError(f"{name}: got shape {tuple(targets.shape)}, wants {tuple(off.shape[:-1])}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {targets.dtype}, wants torch.int64")
    for which, tensor in ((on_name, on), (name, targets)):
        if tensor is not None and tensor.device != off.device:
            raise ValueError(f"{which}: got device {tensor.device}, wants {off.device} as {like}")
