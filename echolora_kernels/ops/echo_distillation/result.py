"""What an Echo-LoRA step's loss consists of, and how it is put together from sums over rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

IGNORE_INDEX = -100
KD_DETACH = ("on", "none", "off")


class EchoLosses(NamedTuple):
    """The total and its parts, scalars in float32 or wider; loss_on and loss_kd are None on an unrouted step."""

    loss: torch.Tensor
    loss_off: torch.Tensor
    loss_on: torch.Tensor | None
    loss_kd: torch.Tensor | None

    def only_total_differentiable(self) -> EchoLosses:
        """The same with detached parts."""
        on, kd = (None if part is None else part.detach() for part in self[2:])
        return EchoLosses(self.loss, self.loss_off.detach(), on, kd)


def combined(
    cross_entropy_off: torch.Tensor,
    cross_entropy_on: torch.Tensor | None,
    divergence: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    kd_weight: float,
    num_items: int | torch.Tensor | None,
) -> EchoLosses:
    """The losses from sums over the rows of `targets` that count; without ON there is only the first."""
    divisor = divisor_of(targets, num_items)
    loss_off = cross_entropy_off / divisor
    if cross_entropy_on is None or divergence is None:
        return EchoLosses(loss_off, loss_off, None, None)
    loss_on = cross_entropy_on / divisor
    loss_kd = temperature**2 * divergence / divisor
    return EchoLosses(loss_off + loss_on + kd_weight * loss_kd, loss_off, loss_on, loss_kd)


def divisor_of(targets: torch.Tensor, num_items: int | torch.Tensor | None) -> int | torch.Tensor:
    """At least 1: without a supervised token the sums are 0 already."""
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return num_items.clamp_min(1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """[N, T]: what each position predicts, the label after it; the last one predicts nothing."""
    nothing = labels.new_full((len(labels), 1), IGNORE_INDEX)
    return torch.cat([labels[:, 1:], nothing], dim=1)[:, : labels.shape[1]]
