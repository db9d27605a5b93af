"""The training losses as functions: from logits, or from hidden states and the output head."""

from __future__ import annotations

import torch

from . import backends
from .ops.echo_distillation import EchoLosses

__all__ = ["EchoLosses", "echo_distillation", "echo_distillation_linear", "echo_distillation_rows"]


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

    Over Q, the positions t whose label at t + 1 is not -100 (docs/method.md "Formulas"; masks P, form R):

        L_off = mean CE(logits_off)        L_on = mean CE(logits_on)
        L_kd  = tau^2 mean KL( softmax(logits_on / tau) || softmax(logits_off / tau) )
        L     = L_off + L_on + kd_weight L_kd          (L = L_off when logits_on is None)

    A logit of -infinity is a token that the branch excludes: nothing is added to the KL for those that ON excludes
    (0 log 0 = 0), and one that OFF alone excludes makes it infinite. With kernels the logits are neither copied nor
    widened; their gradients are the only tensors of that size that are made.

    Args:
        logits_off: [N, T, V], floating, any strides; the softmax runs in float32 or wider.
        logits_on: like logits_off, or None on a step that is not routed.
        labels: [N, T], int64; -100 marks what is not supervised.
        temperature: tau > 0, dimensionless.
        kd_weight: lambda_kd >= 0, dimensionless.
        kd_detach: which side of the KL gets no gradient: "on" (the teacher), "off" (the student) or "none".
        num_items: what to divide the sums by; None means |Q|, so that the result is a mean. With gradient
            accumulation pass the number of supervised tokens of the whole optimizer step.
        backend: None chooses, a name insists.

    Returns:
        EchoLosses(loss, loss_off, loss_on, loss_kd), each differentiable, in float32 (float64 for float64 logits); the
        last two are None when logits_on is None. When Q is empty every part is 0 and still backpropagates zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError, RuntimeError: a label is neither -100 nor a column of the logits ("reference", "cpp"); on a GPU it
            is a device-side assertion ("reference"), or the losses are NaN ("triton").
        BackendUnavailable: `backend` names one that cannot run here.
    """
    implementation = backends.choose("echo_distillation", backend, logits_off.device)
    return implementation(
        logits_off,
        logits_on,
        labels,
        temperature=temperature,
        kd_weight=kd_weight,
        kd_detach=kd_detach,
        num_items=num_items,
    )


def echo_distillation_rows(
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    kd_detach: str = "on",
    num_items: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> EchoLosses:
    """`echo_distillation` for rows of logits that have been chosen: row r predicts targets[r], and nothing is shifted.

    The same formulas over Q, the rows whose target is not -100 (docs/method.md "Formulas"; masks P, form R).

    Args:
        logits_off: [..., V], floating, any strides; usually [R, V].
        logits_on: like logits_off, or None.
        targets: [...], int64; rows with -100 count nothing, whatever their logits are, and get zeros as gradients.
        temperature, kd_weight, kd_detach, num_items, backend: as in `echo_distillation`.

    Returns, Raises:
        As `echo_distillation`.
    """
    implementation = backends.choose("echo_distillation_rows", backend, logits_off.device)
    return implementation(
        logits_off,
        logits_on,
        targets,
        temperature=temperature,
        kd_weight=kd_weight,
        kd_detach=kd_detach,
        num_items=num_items,
    )


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
    backend: str | None = None,
) -> EchoLosses:
    """`echo_distillation_rows` of ``hidden @ weight^T + bias``, the output head's logits, without keeping these.

    With kernels the rows are computed with in chunks, and a chunk's logits become its gradient and then that of the
    hidden states within the forward call; the backward call only multiplies by the incoming gradient. The reference
    has all logits at once. Our choice (O); formulas as `echo_distillation`.

    Args:
        hidden_off: [R, d], floating.
        hidden_on: like hidden_off, or None on a step that is not routed.
        weight: [V, d], dtype of hidden_off (any under autocast, which computes in its own as in `F.linear`).
        targets: [R], int64; rows with -100 count nothing.
        bias: [V] or None, dtype of weight.
        chunk_rows: rows, each of both branches, whose logits are there together; None means about 64 MB of logits,
            but at least 64 rows. A function of V and dtype alone.
        temperature, kd_weight, kd_detach, num_items, backend: as in `echo_distillation`.

    Returns:
        EchoLosses as `echo_distillation`, of which only `loss` is differentiable: the parts are detached.

    Raises:
        ValueError: weight or bias requires a gradient (outside of `torch.no_grad`): only a frozen head is served.
        Others: as `echo_distillation`.
    """
    implementation = backends.choose("echo_distillation_linear", backend, hidden_off.device)
    return implementation(
        hidden_off,
        hidden_on,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        kd_weight=kd_weight,
        kd_detach=kd_detach,
        num_items=num_items,
        chunk_rows=chunk_rows,
    )
