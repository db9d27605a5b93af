"""Attention masks of our own for transformers models: which of them take one, and in which form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .caches import inner_model, why_not_in_parts

_IMPLEMENTATIONS = ("sdpa", "eager")


def why_no_mask(model: nn.Module) -> str | None:
    """None where `model` attends to what a mask [N, W, W] says, else the reason why it cannot."""
    reason = why_not_in_parts(model)
    if reason is not None:
        return reason
    implementation = inner_model(model).config.get_text_config()._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"{implementation} attention takes no mask of our own (sdpa and eager do)"
    return None


def run_with_mask(
    model: nn.Module,
    ids: torch.Tensor,
    allowed: torch.Tensor,
    positions: torch.Tensor,
    logits_to_keep: int,
) -> torch.Tensor:
    """Logits of the last `logits_to_keep` columns, [N, logits_to_keep, V].

    Args:
        ids, positions: [N, W]. allowed: [N, W, W], bool, what each query may attend to but for sliding windows, which
            are measured in `positions`; every query needs something, so that its softmax has a sum.
    """
    output = model(
        input_ids=ids,
        attention_mask=_masks(model, allowed, positions),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=logits_to_keep,
    )
    return output.logits


def _masks(model: nn.Module, allowed: torch.Tensor, positions: torch.Tensor) -> Any:
    """As the model takes them: one mask, or one for each type of layer."""
    inner = inner_model(model)
    config = inner.config.get_text_config()
    window: Any = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    masks = {}
    for kind in types:
        seen = allowed
        if kind == "sliding_attention":
            distance = positions.unsqueeze(2) - positions.unsqueeze(1)
            seen = allowed & (distance < window)
        seen = seen.unsqueeze(1)
        if config._attn_implementation == "eager":  # which adds its mask
            zero = torch.zeros((), dtype=inner.dtype, device=seen.device)
            seen = torch.where(seen, zero, torch.finfo(inner.dtype).min)
        masks[kind] = seen
    return masks if len(masks) > 1 else next(iter(masks.values()))
