"""From measurements to the fastest way: pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ops.echo_lora_linear.candidates import Entry, Problem
from .ways import Way, is_right

# a lead over the rule's choice that the next run would not repeat is none
LEAD = 0.02


@dataclass(frozen=True)
class Measured:
    """What became of one way.

    Args:
        error: as a multiple of plain torch's; None where it could not run. microseconds: of each round.
        problem: why there is no time.
    """

    way: Way
    error: float | None = None
    microseconds: list[float] = field(default_factory=list)
    problem: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper; of a single round, that round."""
        if len(self.microseconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.microseconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Result:
    """All ways of one problem, and what runs without a table."""

    problem: Problem
    rule: Way
    measured: Sequence[Measured]

    @property
    def fastest(self) -> Measured | None:
        """The right way with the least median; the rule's, where it is within `LEAD` of that. None: none is right."""
        timed = [
            each for each in self.measured if each.microseconds and each.error is not None and is_right(each.error)
        ]
        if not timed:
            return None
        best = min(timed, key=lambda each: each.median)
        by_rule = next((each for each in timed if each.way == self.rule), None)
        return by_rule if by_rule and by_rule.median <= (1 + LEAD) * best.median else best

    def entry(self) -> Entry | None:
        """For the table."""
        if (best := self.fastest) is None:
            return None
        p, way = self.problem, best.way
        return Entry(p.product, p.dora, p.dtype, p.m, p.n, p.k, p.rank, way.candidate, way.tile)

    def gain(self) -> float | None:
        """How many times the rule's microseconds the pick's are; None where either has none."""
        best = self.fastest
        by_rule = next((each for each in self.measured if each.way == self.rule and each.microseconds), None)
        return None if best is None or by_rule is None else best.median / by_rule.median
