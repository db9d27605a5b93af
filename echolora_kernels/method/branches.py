"""What both forms of the step do alike: reading the boundaries, making the echoes, the losses of a pass with both branches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..integrations.heads import head_computing, output_head
from ..losses import EchoLosses, echo_distillation_linear, echo_distillation_rows
from ..ops.echo_distillation import IGNORE_INDEX
from ..ops.echo_lora_linear import Echo
from .collect import BoundaryStates, normalise

if TYPE_CHECKING:
    from .model import EchoLoRA


_ANY_VALUE = ("use_cache", "return_dict")  # say how the answer comes, not what it is
_IF_ASKED = ("logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits")  # 0 or False: no


def why_not_cut(echo_lora: EchoLoRA, extra: dict[str, Any]) -> str | None:
    """None where a batch may be cut at its boundaries, else the reason why not.

    Args:
        extra: keyword arguments for the model that `telling_arguments` left.
    """
    if not echo_lora.echo_config.answer_mask:
        return "answer_mask is False: the echo changes the prompts too"
    if extra:
        return f"the model is given {', '.join(sorted(extra))}, which would have to be cut at the boundaries too"
    return None


def telling_arguments(extra: dict[str, Any], attention_mask: torch.Tensor | None) -> dict[str, Any]:
    """Those of the keyword arguments that make a model compute something else than it does without them.

    Args:
        extra: keyword arguments for the model, beside input_ids and attention_mask.
        attention_mask: [N, T] or None.

    Raises:
        ValueError: position_ids start again within a row, which then holds several samples.
    """

    def tells(name: str, value: Any) -> bool:
        if value is None or name in _ANY_VALUE:
            return False
        if name in _IF_ASKED:
            return not (isinstance(value, int) and value == 0)
        return name != "position_ids" or not _counts_columns(value, attention_mask)

    return {name: value for name, value in extra.items() if tells(name, value)}


def _counts_columns(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether every real token has its column as its position, as models number them by themselves."""
    other = position_ids != torch.arange(position_ids.shape[-1], device=position_ids.device)
    falls = position_ids[..., 1:] < position_ids[..., :-1]
    if attention_mask is not None and attention_mask.ndim == position_ids.ndim:
        real = attention_mask != 0
        other, falls = other & real, falls & real[:, 1:] & real[:, :-1]
    if falls.any():
        raise ValueError(
            "position_ids: got positions that start again within a row, wants one sample a row "
            "(its echo is read at the end of its prompt); do not pack samples"
        )
    return not other.any()


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
    for networks in echo_lora.echo_networks:
        parameter = next(networks.parameters())
        here = mask.to(parameter.device)
        for name, delta in networks(u.to(parameter)).items():
            echoes[name] = Echo(delta, here, config.site)
    return echoes


def loss_options(echo_lora: EchoLoRA, num_items: int | torch.Tensor | None) -> dict[str, Any]:
    """What `echo_distillation` and its like are told besides tensors."""
    config = echo_lora.echo_config
    return {
        "temperature": config.kd_temperature,
        "kd_weight": config.kd_weight,
        "kd_detach": config.kd_detach,
        "num_items": num_items,
    }


def losses_of_rows(
    echo_lora: EchoLoRA,
    run_model: Callable[[], torch.Tensor],
    targets: torch.Tensor,
    *,
    routed: bool,
    dim: int,
    num_items: int | torch.Tensor | None,
) -> EchoLosses:
    """Losses of a pass that computes both branches, with logits for the columns alone that predict something.

    Where the head is frozen and nothing follows it, it computes the losses in place of logits; else the logits of
    these columns; a head that is not known computes all.

    Args:
        run_model: runs the model on OFF and ON joined along `dim` (OFF alone if not routed), and gives its logits.
        targets: [N, W], int64: what each column of a branch predicts, -100 for nothing.
        num_items: divisor of the losses, or None for a mean over Q.
    """
    model, options, count = echo_lora.model, loss_options(echo_lora, num_items), 1 + routed
    predicting = targets != IGNORE_INDEX

    def chosen(states: torch.Tensor) -> list[torch.Tensor]:
        return [branch[predicting.to(branch.device)] for branch in states.chunk(count, dim)]

    def of_logits(off: torch.Tensor, on: torch.Tensor | None = None) -> EchoLosses:
        return echo_distillation_rows(off, on, targets[predicting].to(off.device), **options)

    head = output_head(model)
    if head is None:
        return of_logits(*chosen(run_model()))
    if echo_lora.losses_in_head(head):
        made: list[EchoLosses] = []

        def losses(hidden: torch.Tensor) -> torch.Tensor:
            off, *on = chosen(hidden)
            wanted = targets[predicting].to(hidden.device)
            linear: Any = head
            made.append(
                echo_distillation_linear(off, on[0] if on else None, linear.weight, wanted, bias=linear.bias, **options)
            )
            return made[0].loss.reshape(1, 1, 1)  # on its way out it passes whatever hooks wait for gradients

        with head_computing(head, losses):
            loss = run_model()
        return made[0]._replace(loss=loss.reshape(()))

    forward = head.forward
    with head_computing(head, lambda hidden: forward(torch.cat(chosen(hidden)).unsqueeze(0))):
        logits = run_model()
    return of_logits(*logits.squeeze(0).chunk(count))
