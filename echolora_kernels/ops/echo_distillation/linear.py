"""The losses behind a frozen output head, in chunks of rows: the logits of all rows never exist together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..echo_lora_linear.rows import accumulator_dtype
from .kernels import load

CHUNK_BYTES = 2**26  # of logits, both branches
FEWEST_ROWS = 128  # of a product, both branches: fewer would read the head too often


def chunk_rows_for(vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows, each of two branches, are computed with at a time."""
    return max(FEWEST_ROWS, CHUNK_BYTES // max(1, vocabulary * dtype.itemsize)) // 2


def linear_pass(
    hidden_off: torch.Tensor,
    hidden_on: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    backend: str,
    temperature: float,
    kd_weight: float,
    off_learns: bool,
    on_learns: bool,
    chunk_rows: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses over the rows, sums [3], and the gradient of the first for the hidden states in `needs`.

    The gradient is that of the sum, not of the mean: in float16 a mean's would be lost below the smallest number.

    Returns:
        [], [3], and [R, how many are needed, d] in the dtype of the hidden states.
    """
    kernels, learns, which = load(backend), (off_learns, on_learns), (needs[0], needs[1])
    # a row's branches stand together, so that a chunk of both is one product
    hidden = hidden_off.unsqueeze(1) if hidden_on is None else torch.stack((hidden_off, hidden_on), 1)
    rows, branches, width = hidden.shape
    vocabulary, wide = weight.shape[0], accumulator_dtype(hidden.dtype)
    wanted = [branch for branch in range(branches) if needs[branch]]
    sums = hidden.new_zeros((3,), dtype=wide)
    scales = hidden.new_ones((3,), dtype=wide)
    scales[2] = temperature**2 * kd_weight
    d_hidden = hidden.new_empty((rows, len(wanted), width))
    buffer = hidden.new_empty((min(chunk_rows, rows), branches, vocabulary))
    targets = targets.contiguous()
    for begin in range(0, rows, chunk_rows):
        chunk = hidden[begin : begin + chunk_rows]
        count = len(chunk)
        logits = buffer[:count]
        inputs, out = chunk.reshape(-1, width), logits.view(-1, vocabulary)
        if bias is None:
            torch.mm(inputs, weight.t(), out=out)
        else:
            torch.addmm(bias, inputs, weight.t(), out=out)
        off, on = logits[:, 0].unsqueeze(0), logits[:, 1].unsqueeze(0) if branches == 2 else None
        here = targets[begin : begin + count]
        if not wanted:
            sums += kernels.forward(off, on, here, temperature)[0]
            continue
        sums += kernels.forward_and_overwrite(off, on, here, temperature, scales, learns, which)
        d_logits = out if len(wanted) == branches else logits[:, wanted[0]]
        torch.mm(d_logits, weight, out=d_hidden[begin : begin + count].view(-1, width))
    return torch.dot(sums, scales), sums, d_hidden


def scaled_gradients(
    d_hidden: torch.Tensor, d_total: torch.Tensor, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the hidden states, None where not needed, from what `linear_pass` saved."""
    # in the wide dtype: a factor rounded to half precision would be an error that all rows share
    scaled = iter((d_hidden.to(d_total.dtype) * d_total).to(d_hidden.dtype).unbind(1))
    return tuple(next(scaled) if need else None for need in needs)
