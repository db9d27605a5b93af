"""What both forms of the step do alike: reading the boundaries, making the echoes, the losses of the two branches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..losses import EchoLosses, echo_distillation
from ..ops.echo_lora_linear import Echo
from .collect import BoundaryStates, normalise

if TYPE_CHECKING:
    from .model import EchoLoRA


def recording_of(echo_lora: EchoLoRA, b: torch.Tensor) -> Any:
    """A context that records the boundary states at positions b, [N], on a routed step, and nothing on others."""
    config = echo_lora.echo_config
    if not echo_lora.routed:
        return nullcontext()
    return BoundaryStates(echo_lora.source_blocks, b, pooling=config.source_pooling, detach=config.detach_source)


def echoes_of(echo_lora: EchoLoRA, states: BoundaryStates, mask: torch.Tensor) -> dict[str, Echo]:
    """Delta of every target module, from the states of a pass that has run, on the module's device."""
    config = echo_lora.echo_config
    u = normalise(states.pooled(), config.norm_eps)
    echoes = {}
    for key, network in echo_lora.echo_networks.items():
        parameter = next(network.parameters())
        echoes[key] = Echo(network(u.to(parameter)), mask.to(parameter.device), config.site)
    return echoes


def losses_of(
    echo_lora: EchoLoRA,
    logits_off: torch.Tensor,
    logits_on: torch.Tensor | None,
    labels: torch.Tensor,
    num_items: int | torch.Tensor | None,
) -> EchoLosses:
    """`echo_distillation` as the configuration wants it."""
    config = echo_lora.echo_config
    return echo_distillation(
        logits_off,
        logits_on,
        labels,
        temperature=config.kd_temperature,
        kd_weight=config.kd_weight,
        kd_detach=config.kd_detach,
        num_items=num_items,
    )
