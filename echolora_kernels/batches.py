"""Batches for `EchoLoRA`: which samples go together, and how they are padded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from .ops.echo_distillation import IGNORE_INDEX

__all__ = ["EchoDataCollator", "PromptLengthSampler"]

# keys at which cuDNN's attention, given a mask, has NaN for a gradient where a row's scores are low, as those of padding
# that sees nothing: torch 2.11 to 2.13 on Hopper GPUs, https://github.com/pytorch/pytorch/issues/196678
_BAD_WIDTH = 64, 128  # remainder, divisor
_SAYS_THE_ANSWER = ("labels", "prompt_length", "completion_mask")


def columns_to_add(*widths: int) -> int:
    """The fewest columns of padding with which attention over any of these widths has a gradient, see `_BAD_WIDTH`."""
    remainder, divisor = _BAD_WIDTH
    return next(n for n in range(len(widths) + 1) if all((width + n) % divisor != remainder for width in widths))


class EchoDataCollator:
    """Pads samples on the right, supervised on the answers alone.

    The step itself moves prompts and answers to where it wants them, so any padding will do; what wastes nothing is a
    batch of prompts of like lengths, see `PromptLengthSampler`. Our choice (O).

    Args:
        pad_token_id: what padding holds; nothing attends to it.
        pad_to_multiple_of: widths are rounded up to a multiple of this, or to the longest sample; and on to the next one
            where torch's attention has no gradient on some GPUs (64, 192, 320, ...).

    Raises:
        ValueError: pad_to_multiple_of is not at least 1.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: got {pad_to_multiple_of}, wants None or at least 1")
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch.

        Args:
            features: samples with `input_ids`, prompt and answer, T_n tokens each, and one of
                `labels`, as many, -100 on the prompt; `prompt_length`, a number of tokens; `completion_mask`, as many
                as tokens, 1 on the answer (TRL's name). `attention_mask`, if there, leaves tokens out.

        Returns:
            input_ids, attention_mask and labels, [N, T], int64.

        Raises:
            ValueError: no sample; a sample without a word of its answer, with other keys, or with lengths that differ.
        """
        if not features:
            raise ValueError("features: got none, wants at least one sample")
        rows = [_row(index, feature) for index, feature in enumerate(features)]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(ids) for ids, _, _ in rows) // multiple) * multiple
        while columns_to_add(width):
            width += multiple
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORE_INDEX),
        }
        for index, row in enumerate(rows):
            for padded, values in zip(batch.values(), row, strict=True):
                padded[index, : len(values)] = values
        return batch


def _row(index: int, feature: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels of one sample."""
    given = [name for name in _SAYS_THE_ANSWER if name in feature]
    other = sorted(set(feature) - {"input_ids", "attention_mask", *_SAYS_THE_ANSWER})
    if "input_ids" not in feature or len(given) != 1 or other:
        raise ValueError(
            f"features[{index}]: got keys {sorted(feature)}, wants input_ids, one of {', '.join(_SAYS_THE_ANSWER)}, "
            "and perhaps attention_mask"
        )
    ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
    mask = torch.as_tensor(feature.get("attention_mask", torch.ones_like(ids)), dtype=torch.int64)
    if given == ["labels"]:
        labels = torch.as_tensor(feature["labels"], dtype=torch.int64)
    elif given == ["prompt_length"]:
        labels = ids.clone()
        labels[: feature["prompt_length"]] = IGNORE_INDEX
    else:
        answer = torch.as_tensor(feature["completion_mask"])
        if len(answer) != len(ids):
            raise ValueError(f"features[{index}]: got {len(answer)} of completion_mask, wants {len(ids)} as input_ids")
        labels = ids.masked_fill(answer == 0, IGNORE_INDEX)
    for name, values in (("attention_mask", mask), ("labels", labels)):
        if values.shape != ids.shape or ids.ndim != 1:
            shapes = f"{tuple(ids.shape)} and {tuple(values.shape)}"
            raise ValueError(f"features[{index}]: got shapes {shapes} of input_ids and {name}, wants [T] of both")
    return ids, mask, labels


class PromptLengthSampler(Sampler[int]):
    """Batches of prompts of like lengths, in random order: little padding, and nearly as random as a shuffle.

    An epoch's samples are shuffled and cut into windows of many batches; within each they are sorted by length and cut
    into batches, and then the order of all batches is shuffled. A function of (seed, epoch) alone. Our choice (O).

    Args:
        prompt_lengths: tokens of each sample's prompt.
        batch_size: samples that go together: of one batch, or of all batches of an optimizer step.
        seed: of the shuffles; equal on every rank.
        window: batches that are sorted together.

    Raises:
        ValueError: there is no sample, or a size is not at least 1.
    """

    def __init__(self, prompt_lengths: Sequence[int], batch_size: int, *, seed: int = 0, window: int = 50) -> None:
        for name, size in (("prompt_lengths", len(prompt_lengths)), ("batch_size", batch_size), ("window", window)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, wants at least 1")
        self.prompt_lengths, self.batch_size = list(prompt_lengths), batch_size
        self.seed, self.window, self.epoch = seed, window, 0
        self._known: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iteration is over; a loop or trainer calls this."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """The samples of one epoch."""
        if epoch not in self._known:
            draw = random.Random(f"{self.seed}/{epoch}")
            indices = list(range(len(self)))
            draw.shuffle(indices)
            size, wide = self.batch_size, self.batch_size * self.window
            rows = [
                sorted(indices[i : i + wide], key=self.prompt_lengths.__getitem__) for i in range(0, len(self), wide)
            ]
            flat = [index for row in rows for index in row]
            batches = [flat[i : i + size] for i in range(0, len(self), size)]
            rest = [batches.pop()] if len(batches[-1]) < size else []  # last, so that all others are whole
            draw.shuffle(batches)
            known = [index for batch in [*batches, *rest] for index in batch]
            self._known = {**dict(list(self._known.items())[-1:]), epoch: known}
        return self._known[epoch]

    def step(self, step: int) -> list[int]:
        """The samples of one optimizer step, counted over all epochs from 0: batch_size of them."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.order(position // len(self))[position % len(self)] for position in positions]
