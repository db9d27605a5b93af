"""The least that a case can cost on a device: for each part of the work, its arithmetic or its traffic, if that is more.

A layer's parts: the base product forward and backward, x read once more for S = x A^T and once more for dA, dY read once
more for dB and dS (shape-wise: 4 M K + 2 M N bytes in bfloat16), and the low-rank term added to the base products.
DoRA reads W0 once more for its norm and y once more for the magnitude's gradient; with dropout, in PEFT's form, it has
two base products. The passes are taken to read memory: a processor that still has x in its cache can be faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from .problem import Stage
from .rates import Rates


def milliseconds(stages: Sequence[Stage], rates: Rates, dtype: str) -> float:
    """The floor of all stages, one after the other."""
    flops, size = 1e9 * rates.teraflops[dtype], 1e6 * rates.gigabytes  # in a millisecond
    return sum(max(stage.flops / flops, stage.size / size) for stage in stages)


def layer(
    rows: int,
    d_in: int,
    widths: Sequence[int],
    rank: int,
    *,
    dora: bool,
    dropout: float,
    itemsize: int,
    weight_size: float | None = None,
) -> dict[str, list[Stage]]:
    """phase -> stages of adapted linears that share their x.

    Args:
        rows: M. d_in: K. widths: N of each projection.
        itemsize: bytes of an element; weight_size: of one of W0, where that is quantised.
    """
    x, y = rows * d_in * itemsize, rows * sum(widths) * itemsize
    weights = d_in * sum(widths) * (itemsize if weight_size is None else weight_size)
    products = 2.0 * rows * d_in * sum(widths) * (2 if dora and dropout else 1)
    inner, outer = 2.0 * rows * d_in * rank * len(widths), 2.0 * rows * sum(widths) * rank
    forward = [
        Stage("base", products, x + weights + y, base=True),
        Stage("S = x A^T", inner, x),
        Stage("S B^T, added", outer, 0),
    ]
    backward = [
        Stage("base", products, x + weights + y, base=True),
        Stage("dB and dS", 2 * outer, y),
        Stage("dA", inner, x),
        Stage("dS A, added", inner, 0),
    ]
    if dora:
        forward.append(Stage("norm of W0 + s B A", 2.0 * d_in * sum(widths) * rank, weights))
        backward.append(Stage("gradient of the magnitude", 0, y))
    return _phases(forward, backward)


def loss(rows: int, width: int, vocabulary: int, branches: int, itemsize: int, hidden: bool) -> dict[str, list[Stage]]:
    """phase -> stages of the losses: from hidden states the head's products, else the logits read and their gradients."""
    count = rows * branches
    if hidden:
        head, states = width * vocabulary * itemsize, count * width * itemsize
        product = Stage("head", 2.0 * count * width * vocabulary, head + states, base=True)
        return _phases([product], [product])
    logits = count * vocabulary * itemsize
    return _phases([Stage("logits", 0, logits)], [Stage("gradients of the logits", 0, 2 * logits)])


def networks(samples: int, parameters: int, itemsize: int) -> dict[str, list[Stage]]:
    """phase -> stages of the echo networks: every parameter read forward, and read and its gradient written backward."""
    size = parameters * itemsize
    flops = 2.0 * samples * parameters
    return _phases([Stage("parameters", flops, size)], [Stage("parameters, gradients", 2 * flops, 2 * size)])


def _phases(forward: list[Stage], backward: list[Stage]) -> dict[str, list[Stage]]:
    return {"forward": forward, "backward": backward, "both": forward + backward}
