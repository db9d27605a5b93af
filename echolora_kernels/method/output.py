"""What a training step returns."""

from __future__ import annotations

from typing import Any

import torch


class EchoLoRAOutput(dict):
    """A dict (for trainers) whose items are also attributes (for people).

    Items:
        loss: L = L_off + r_k (L_on + lambda_kd L_kd), to call backward() on; scalar, float32 or wider.
        loss_off: L_off, detached. loss_on, loss_kd: likewise, or None on a step that is not routed.
        routed: r_k, bool.
        logits: OFF logits [N, T, V], detached; None after a shared step, which computes those of answers alone.
        skipped_samples: samples of the batch without a supervised token, which no loss comes from; int.
    """

    loss: torch.Tensor
    loss_off: torch.Tensor
    loss_on: torch.Tensor | None
    loss_kd: torch.Tensor | None
    routed: bool
    logits: torch.Tensor | None
    skipped_samples: int

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no item {name!r}") from None
