"""The plain form of a training step: the whole batch OFF, then, on routed steps, the whole batch ON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..losses import EchoLosses, echo_distillation
from ..ops.echo_distillation import IGNORE_INDEX
from .branches import echoes_of, loss_options, recording_of
from .collect import boundaries

if TYPE_CHECKING:
    from .model import EchoLoRA

RunModel = Callable[[], torch.Tensor]


def two_pass_step(
    echo_lora: EchoLoRA,
    run_model: RunModel,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_items: int | torch.Tensor | None,
) -> tuple[EchoLosses, torch.Tensor, int]:
    """Losses, OFF logits and the number of samples without supervision.

    Args:
        echo_lora: the wrapper; its routing step decides whether the ON branch runs.
        run_model: runs the wrapped model on the batch and gives logits [N, T, V].
        labels: [N, T], int64. attention_mask: [N, T] or None.
        num_items: divisor of the losses, or None for a mean over Q.
    """
    config = echo_lora.echo_config
    b, supervised = boundaries(labels, attention_mask)
    routed = echo_lora.routed
    recording = recording_of(echo_lora, b)
    if routed and not config.detach_source and echo_lora.injector.reentrant():
        raise RuntimeError(
            "detach_source: got False, wants True with reentrant gradient checkpointing, whose "
            "backward pass would go through the boundary states twice"
        )
    with recording, echo_lora.injector.injecting(None):
        logits_off = run_model()

    logits_on = None
    if routed:
        mask = _injected_positions(config.answer_mask, labels, attention_mask)
        with echo_lora.injector.injecting(echoes_of(echo_lora, recording, mask)):
            logits_on = run_model()

    losses = echo_distillation(logits_off, logits_on, labels, **loss_options(echo_lora, num_items))
    return losses, logits_off, int((~supervised).sum())


def _injected_positions(answer_mask: bool, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """M, [N, T], bool: the answer (docs/method.md "answer mask"; name P, form R), or every real position."""
    if answer_mask:
        return labels != IGNORE_INDEX
    return torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask != 0
