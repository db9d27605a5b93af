"""The training step at about the price of a plain one: prompts once, then all answers, OFF and ON, in one pass.

Before the first supervised token both branches compute the same numbers, since the echo enters at answer positions and
attention is causal. So the prompts run once, with their keys and values kept in the graph, and both branches' answers
attend to them: the same losses and gradients as `two_pass` (docs/method.md "The shared step"; O).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..integrations.blocks import decoder_blocks, gather_in_backward
from ..integrations.caches import new_cache, repeated_cache, run_with_cache, why_no_cache
from ..integrations.heads import without_logits
from ..losses import EchoLosses
from ..ops.echo_lora_linear import Echo
from .branches import echoes_of, losses_of_rows, recording_of, why_not_cut
from .collect import boundaries
from .split import split

if TYPE_CHECKING:
    from .model import EchoLoRA


def why_not_shared(echo_lora: EchoLoRA, extra: dict[str, Any]) -> str | None:
    """None where the shared step can be taken, else the reason why not.

    Args:
        extra: keyword arguments for the model that `telling_arguments` left.
    """
    reason = why_not_cut(echo_lora, extra)
    if reason is not None:
        return reason
    if echo_lora.injector.checkpointing():
        return "gradient checkpointing keeps no keys and values"
    return why_no_cache(echo_lora.model)


def shared_step(
    echo_lora: EchoLoRA,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_items: int | torch.Tensor | None,
) -> tuple[EchoLosses, int]:
    """Losses and the number of samples without supervision; arguments as those of `two_pass_step`."""
    routed = echo_lora.routed
    b, supervised = boundaries(labels, attention_mask)
    parts = split(input_ids, labels, attention_mask, b)
    recording = recording_of(echo_lora, torch.full_like(b, parts.prompt.width - 1))
    model, prompt, answer = echo_lora.model, parts.prompt, parts.answer
    cache = new_cache()
    with recording, echo_lora.injector.injecting(None), without_logits(model):
        run_with_cache(model, prompt.ids, prompt.mask, prompt.positions, cache, 1)
    gather_in_backward(decoder_blocks(model)[1][-1], cache.layers[-1].keys, cache.layers[-1].values)

    branches = 2 if routed else 1
    echoes = None
    if routed:
        # OFF rows come first, with a mask of zeros: their sums are those without an echo
        mask = torch.cat([torch.zeros_like(parts.injected), parts.injected])
        on = echoes_of(echo_lora, recording, parts.injected)
        echoes = {key: _after_off_rows(echo, mask) for key, echo in on.items()}
    # the boundary is run again among the answers, where its logits are wanted; its states were all it was needed for
    before = torch.cat([prompt.mask[:, :-1], answer.mask], dim=1)

    def run_answers() -> torch.Tensor:
        return run_with_cache(
            model,
            answer.ids.repeat(branches, 1),
            before.repeat(branches, 1),
            answer.positions.repeat(branches, 1),
            repeated_cache(cache, prompt.width - 1, branches),
            0,
        )

    with echo_lora.injector.injecting(echoes):
        losses = losses_of_rows(echo_lora, run_answers, parts.targets, routed=routed, dim=0, num_items=num_items)
    return losses, int((~supervised).sum())


def _after_off_rows(echo: Echo, mask: torch.Tensor) -> Echo:
    return Echo(torch.cat([torch.zeros_like(echo.delta), echo.delta]), mask.to(echo.delta.device), echo.site)
