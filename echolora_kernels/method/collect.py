"""Boundaries and answer masks from labels; boundary states from the source blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.echo_distillation import IGNORE_INDEX


def boundaries(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The last prompt position of each sample, and which samples have one.

    ``a_n = first t with labels[n, t] != -100``; ``b_n = a_n - 1`` (docs/method.md "boundary"; boundary P, last token R).

    Args:
        labels: [N, T], int64.
        attention_mask: [N, T], nonzero where a position is real, or None when all are.

    Returns:
        b: [N], int64; 0 where there is no supervised token. supervised: [N], bool.

    Raises:
        ValueError: a sample's answer starts at its first real token, so that no prompt token precedes it.
    """
    answer = labels != IGNORE_INDEX
    supervised = answer.any(dim=1)
    first = answer.int().argmax(dim=1)
    b = (first - 1).clamp_min(0)
    has_prompt = first > 0
    if attention_mask is not None:
        has_prompt &= attention_mask.gather(1, b.unsqueeze(1)).squeeze(1) != 0
    orphans = (supervised & ~has_prompt).nonzero().flatten().tolist()
    if orphans:
        raise ValueError(
            f"labels: got no prompt token before the first supervised one in samples {orphans}, "
            "wants at least one (the echo is read there); mask the prompt with -100"
        )
    return b, supervised


class BoundaryStates:
    """Context manager that records the outputs of the source blocks at each sample's boundary.

    Args:
        blocks: the source blocks S.
        b: [N], boundary positions.
        pooling: "mean" over the blocks, or "last", the deepest alone.
        detach: keep no gradient.
    """

    def __init__(self, blocks: Iterable[nn.Module], b: torch.Tensor, *, pooling: str, detach: bool) -> None:
        self._blocks = list(blocks)
        if pooling == "last":
            self._blocks = self._blocks[-1:]
        self._b, self._detach = b, detach
        self._states: dict[int, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> BoundaryStates:
        for index, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_hook(self._recorder(index)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, index: int) -> Any:
        def record(block: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            state = hidden[torch.arange(len(self._b), device=hidden.device), self._b.to(hidden.device)]
            self._states[index] = state.detach() if self._detach else state

        return record

    def pooled(self) -> torch.Tensor:
        """z, [N, d], float32 or wider: the mean of the recorded states (docs/method.md "collect"; R)."""
        missing = [index for index in range(len(self._blocks)) if index not in self._states]
        if missing:
            raise RuntimeError(f"the forward pass did not run source blocks {missing} of the recorded ones")
        device = self._states[0].device
        states = [self._states[index].to(device) for index in range(len(self._blocks))]
        wide = torch.promote_types(states[0].dtype, torch.float32)
        return torch.stack([state.to(wide) for state in states]).mean(dim=0)


def normalise(z: torch.Tensor, eps: float) -> torch.Tensor:
    """u, [N, d]: LayerNorm of z without affine parameters (docs/method.md "normalise"; R)."""
    return F.layer_norm(z, z.shape[-1:], eps=eps)
