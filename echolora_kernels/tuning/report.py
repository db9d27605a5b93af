"""What was measured, as text and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .select import Measured, Result


@dataclass
class Report:
    """What became of a run.

    Args:
        device: its name. path: of the table; None where none is written. total: how many problems were asked for.
        results: of those that are done.
    """

    device: str
    path: Path | None
    total: int
    results: list[Result] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every way is right."""
        return not any(self.problems())

    def problems(self) -> Iterator[str]:
        """A line for each way that is wrong or cannot run."""
        for result in self.results:
            p = result.problem
            for each in result.measured:
                if each.problem:
                    yield f"{each.way}, {_sizes(result)}, {p.dtype}: {each.problem}"

    def text(self) -> str:
        """A line for each problem: the pick, its median and quartiles, the rule's choice and the fastest other candidate
        over it."""
        lines = [f"{self.device}: microseconds (median, quartiles) of the fastest way, and what others take over it"]
        for result in self.results:
            best = result.fastest
            if best is None:
                lines.append(f"{_sizes(result)}  no way is right")
                continue
            low, high = best.quartiles
            others = ", ".join(
                f"{name} {each.median / best.median:.2f}" for name, each in _others(result, best).items()
            )
            lines.append(f"{_sizes(result)}  {best.way!s:<26} {best.median:9.1f} ({low:.1f} to {high:.1f})  {others}")
        lines += self.problems()
        if len(self.results) < self.total:
            lines.append(f"not measured: {self.total - len(self.results)} of {self.total} problems")
        lines.append(
            "nothing is written" if self.path is None else f"{self.path}; ECHOLORA_TUNED={self.path.parent} uses it"
        )
        return "\n".join(lines)

    def as_json(self) -> str:
        """Everything, every round too."""
        found: dict[str, Any] = {
            "device": self.device,
            "versions": versions(),
            "table": None if self.path is None else str(self.path),
            "problems": self.total,
            "results": [
                {
                    **_fields(result),
                    "rule": str(result.rule),
                    "fastest": None if result.fastest is None else str(result.fastest.way),
                    "ways": {
                        str(each.way): {"error": each.error, "microseconds": each.microseconds, "problem": each.problem}
                        for each in result.measured
                    },
                }
                for result in self.results
            ],
        }
        return json.dumps(found, indent=1)


def versions() -> dict[str, str]:
    """Of what decides how fast the ways are."""
    return {
        "echolora_kernels": __version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda or "none",
    }


def _others(result: Result, best: Measured) -> dict[str, Measured]:
    """The rule's choice, and the fastest way of each other candidate."""
    right = [each for each in result.measured if each.microseconds]
    by_rule = [each for each in right if each.way == result.rule and each is not best]
    found = {"rule": by_rule[0]} if by_rule else {}
    for each in sorted(right, key=lambda each: each.median):
        if each.way.candidate != best.way.candidate:
            found.setdefault(each.way.candidate, each)
    return found


def _sizes(result: Result) -> str:
    p = result.problem
    method = "dora" if p.dora else "lora"
    return f"{p.product:<14} {method} M {p.m:<5} N {p.n:<5} K {p.k:<5} r {p.rank:<3}"


def _fields(result: Result) -> dict[str, Any]:
    names = ("product", "dora", "dtype", "arch", "m", "n", "k", "rank")
    return {name: getattr(result.problem, name) for name in names}
