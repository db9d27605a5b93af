"""The training step where keys and values cannot be kept: the prompts for z alone, then prompts and answers in one row.

Gradient checkpointing recomputes blocks, so no pass may attend to what another left behind. Instead every sample is one
row of columns [prompt | OFF answer | ON answer], and a mask hides the branches from each other. What the boundary states
need is a pass over the prompts that keeps no graph (docs/method.md "The packed step"; O).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..integrations.heads import without_logits
from ..integrations.masks import run_with_mask, why_no_mask
from ..losses import EchoLosses
from ..ops.echo_lora_linear import Echo
from .branches import echoes_of, losses_of_rows, recording_of, why_not_cut
from .collect import boundaries
from .split import Part, split

if TYPE_CHECKING:
    from .model import EchoLoRA


def why_not_packed(echo_lora: EchoLoRA, extra: dict[str, Any]) -> str | None:
    """None where the packed step can be taken, else the reason why not; arguments as those of `why_not_shared`."""
    reason = why_not_cut(echo_lora, extra)
    if reason is not None:
        return reason
    if not echo_lora.echo_config.detach_source:
        return "detach_source is False: the pass over the prompts would need its graph"
    return why_no_mask(echo_lora.model)


def packed_step(
    echo_lora: EchoLoRA,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_items: int | torch.Tensor | None,
) -> tuple[EchoLosses, int]:
    """Losses and the number of samples without supervision; arguments as those of `two_pass_step`."""
    b, supervised = boundaries(labels, attention_mask)
    parts = split(input_ids, labels, attention_mask, b)
    model, prompt, answer = echo_lora.model, parts.prompt, parts.answer
    echoes: dict[str, Echo] | None = None
    if echo_lora.routed:
        recording = recording_of(echo_lora, torch.full_like(b, prompt.width - 1))
        with torch.no_grad(), recording, echo_lora.injector.injecting(None), without_logits(model):
            run_with_mask(model, prompt.ids, _allowed([prompt]), prompt.positions, 1)
        # the echo goes to the ON answers, which are the last columns
        before = torch.zeros_like(prompt.mask[:, :-1])
        mask = torch.cat([before, torch.zeros_like(parts.injected), parts.injected], dim=1)
        echoes = echoes_of(echo_lora, recording, mask)

    # the boundary is run among the answers, where its logits are wanted
    pieces = [prompt.without_last(), *[answer] * (2 if echoes else 1)]
    row = Part.joined(pieces)
    kept = row.width - pieces[0].width

    def run_row() -> torch.Tensor:
        return run_with_mask(model, row.ids, _allowed(pieces), row.positions, kept)

    with echo_lora.injector.injecting(echoes):
        losses = losses_of_rows(
            echo_lora, run_row, parts.targets, routed=echoes is not None, dim=1, num_items=num_items
        )  # fmt: skip
    return losses, int((~supervised).sum())


def _allowed(pieces: list[Part]) -> torch.Tensor:
    """[N, W, W], bool: keys that are real, no later, and of the prompt or the query's own branch; and every query's own.

    Padding attends to itself, for its softmax to have a sum; nothing attends to padding.
    """
    row = Part.joined(pieces)
    piece = torch.cat([torch.full((part.width,), index) for index, part in enumerate(pieces)]).to(row.ids.device)
    mine = (piece == 0) | (piece.unsqueeze(1) == piece)
    earlier = row.positions.unsqueeze(1) <= row.positions.unsqueeze(2)
    itself = torch.eye(row.width, dtype=torch.bool, device=row.ids.device)
    return mine & earlier & row.mask.unsqueeze(1) | itself
