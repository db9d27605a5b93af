"""What is to be tuned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..ops.echo_lora_linear.candidates import Problem
from ..ops.echo_lora_linear.configs import MAX_RANK
from .shapes import Shape

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Request:
    """What to tune.

    Args:
        shapes: of the linears, [d_out, d_in]. tokens: rows of x. methods: "lora", "dora".
        rounds: of timing. workers: threads that compile.
        seconds: no further problem is begun after that; None for all.
    """

    shapes: Sequence[Shape]
    ranks: Sequence[int]
    dtypes: Sequence[str]
    tokens: Sequence[int]
    methods: Sequence[str]
    rounds: int = 20
    workers: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, got, wanted in (("dtype", self.dtypes, DTYPES), ("method", self.methods, ("lora", "dora"))):
            for value in got:
                if value not in wanted:
                    raise ValueError(f"{name}: got {value!r}, wants one of {', '.join(wanted)}")
        for name, numbers, most in (("rank", self.ranks, MAX_RANK), ("tokens", self.tokens, 2**31 - 1)):
            for number in numbers:
                if not 1 <= number <= most:
                    raise ValueError(f"{name}: got {number}, wants 1 to {most}")
        for name, number in (("rounds", self.rounds), ("workers", self.workers)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, wants at least 1")

    def problems(self, arch: str = "") -> list[Problem]:
        """All of them: the largest numbers of rows and forward passes of LoRA come first."""
        products = ("forward", "input-gradient")
        order = itertools.product(
            self.dtypes, sorted(set(self.tokens), reverse=True), self.methods, products, self.ranks, self.shapes
        )
        return [
            Problem(product, m, n, k, rank, dtype, arch, dora=method == "dora")
            for dtype, m, method, product, rank, (n, k) in order
        ]
