"""A batch cut at its boundaries: the prompts, and what is predicted after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..batches import columns_to_add
from ..ops.echo_distillation import IGNORE_INDEX


@dataclass(frozen=True)
class Part:
    """Some positions of every sample, moved together.

    Attributes:
        ids: [N, W] tokens. mask: [N, W], bool, where a token is real. positions: [N, W], columns of the whole batch
            they come from; 0 where none is real.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def behind_padding(self, columns: int) -> Part:
        """With so many more columns on the left, none of which is real."""
        return Part(*(F.pad(tensor, (columns, 0)) for tensor in (self.ids, self.mask, self.positions)))

    def without_last(self) -> Part:
        """All columns but the last."""
        return Part(self.ids[:, :-1], self.mask[:, :-1], self.positions[:, :-1])

    @staticmethod
    def joined(parts: Sequence[Part]) -> Part:
        """The parts side by side."""
        return Part(
            *(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("ids", "mask", "positions"))
        )


@dataclass(frozen=True)
class Split:
    """A batch cut at its boundaries.

    Attributes:
        prompt: real positions up to the boundary, which is in the last column of every sample (padding is left).
        answer: positions from the boundary on that a supervised token is predicted from, or that come before one which
            is; padding is right. A sample without supervision has its boundary alone.
        targets: [N, W_answer], the label that each answer position predicts, -100 for none.
        injected: [N, W_answer], bool, answer positions that are supervised tokens themselves: where the echo goes.
    """

    prompt: Part
    answer: Part
    targets: torch.Tensor
    injected: torch.Tensor


def split(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None, boundary: torch.Tensor
) -> Split:
    """Cut a batch.

    Args:
        input_ids, labels: [N, T], int64. attention_mask: [N, T] or None.
        boundary: [N], last prompt position of each sample; see `collect.boundaries`.
    """
    length = input_ids.shape[1]
    column = torch.arange(length, device=input_ids.device)
    b = boundary.unsqueeze(1)
    real = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    real = real | (column == b)  # a sample without supervision may have padding there; nothing comes of it
    supervised = labels != IGNORE_INDEX
    # the last supervised token itself is no input: nothing that counts is predicted from it
    last = (supervised * column).amax(dim=1, keepdim=True) - 1
    prompt = _gather(input_ids, real & (column <= b), left=True)
    answer = _gather(input_ids, real & (column >= b) & ((column <= last) | (column == b)), left=False)
    # the steps attend to the prompt, and to it before one or two answers in place of its last column
    before = prompt.width - 1
    added = columns_to_add(prompt.width, before + answer.width, before + 2 * answer.width)
    prompt = prompt.behind_padding(added) if added else prompt
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE_INDEX)], dim=1)
    targets = following.gather(1, answer.positions).masked_fill(~answer.mask, IGNORE_INDEX)
    injected = supervised.gather(1, answer.positions) & answer.mask
    return Split(prompt, answer, targets, injected)


def _gather(ids: torch.Tensor, chosen: torch.Tensor, left: bool) -> Part:
    """The chosen positions of every sample in their order, with padding on the left or the right."""
    counts = chosen.sum(dim=1, keepdim=True)
    width = int(counts.max())
    order = torch.sort(chosen.int() if left else (~chosen).int(), dim=1, stable=True).indices
    order = order[:, ids.shape[1] - width :] if left else order[:, :width]
    slot = torch.arange(width, device=ids.device)
    mask = slot >= width - counts if left else slot < counts
    return Part(ids.gather(1, order), mask, order.masked_fill(~mask, 0))
