"""The plain form of a training step: the whole batch OFF, then, on routed steps, the whole batch ON."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..losses import EchoLosses, echo_distillation
from ..ops.echo_distillation import IGNORE_INDEX
from ..ops.echo_lora_linear import Echo
from .collect import BoundaryStates, boundaries, normalise

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
    recording: Any = nullcontext()
    if routed:
        recording = BoundaryStates(
            echo_lora.source_blocks, b, pooling=config.source_pooling, detach=config.detach_source
        )
        if not config.detach_source and echo_lora.injector.reentrant():
            raise RuntimeError(
                "detach_source: got False, wants True with reentrant gradient checkpointing, whose "
                "backward pass would go through the boundary states twice"
            )
    with recording, echo_lora.injector.injecting(None):
        logits_off = run_model()

    logits_on = None
    if routed:
        mask = _injected_positions(config.answer_mask, labels, attention_mask)
        u = normalise(recording.pooled(), config.norm_eps)
        with echo_lora.injector.injecting(echoes_of(echo_lora, u, mask)):
            logits_on = run_model()

    losses = echo_distillation(
        logits_off,
        logits_on,
        labels,
        temperature=config.kd_temperature,
        kd_weight=config.kd_weight,
        kd_detach=config.kd_detach,
        num_items=num_items,
    )
    return losses, logits_off, int((~supervised).sum())


def _injected_positions(answer_mask: bool, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """M, [N, T], bool: the answer (docs/method.md "answer mask"; name P, form R), or every real position."""
    if answer_mask:
        return labels != IGNORE_INDEX
    return torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask != 0


def echoes_of(echo_lora: EchoLoRA, u: torch.Tensor, mask: torch.Tensor) -> dict[str, Echo]:
    """Delta of every target module, on the module's device."""
    config = echo_lora.echo_config
    echoes = {}
    for key, network in echo_lora.echo_networks.items():
        parameter = next(network.parameters())
        delta = network(u.to(parameter))
        if config.dora_echo == "inside":
            gain = echo_lora.targets[key].gain()
            delta = delta if gain is None else gain * delta
        echoes[key] = Echo(delta, mask.to(parameter.device), config.site)
    return echoes
