"""The training loss as a function."""

from __future__ import annotations

import torch

from . import backends
from .ops.echo_distillation import EchoLosses

__all__ = ["EchoLosses", "echo_distillation"]


def echo_distillation(
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> EchoLosses:
    """Cross-entropy of the OFF and ON branches and the distillation of ON into OFF.

    Over Q, the positions t whose label at t + 1 is not -100 (docs/method.md "Formulas"; masks P, form R)::

        L_off = mean CE(logits_off)        L_on = mean CE(logits_on)
        L_kd  = tau^2 mean KL( softmax(logits_on / tau) || softmax(logits_off / tau) )
        L     = L_off + L_on + kd_weight L_kd          (L = L_off when logits_on is None)

    Args:
        logits_off: [N, T, V], floating; the softmax runs in float32 or wider.
        logits_on: like logits_off, or None on a step that is not routed.
        labels: [N, T], int64; -100 marks what is not supervised.
        temperature: tau > 0, dimensionless.
        kd_weight: lambda_kd >= 0, dimensionless.
        kd_detach: which side of the KL gets no gradient: "on" (the teacher), "off" (the student) or "none".
        num_items: what to divide the sums by; None means |Q|, so that the result is a mean. With gradient
            accumulation pass the number of supervised tokens of the whole optimizer step.
        backend: None chooses, a name insists.

    Returns:
        EchoLosses(loss, loss_off, loss_on, loss_kd); the last two are None when logits_on is None. When Q is empty
        every part is 0 and still backpropagates zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    implementation = backends.choose("echo_distillation", backend)
    return implementation(
        logits_off,
        logits_on,
        labels,
        temperature=temperature,
        kd_weight=kd_weight,
        kd_detach=kd_detach,
        num_items=num_items,
    )
