"""Whether an implementation is right: its errors against float64, as multiples of plain torch's in the same dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..verification.trials import Errors
from .problem import Implementation, Tensors

SEED = 7  # of the dropout masks of the check, which `expected` replays

_FEW = 64  # the errors of fewer numbers are a matter of luck: they have to be within a few units in the last place
_UNITS = 4
_ALONE = 2  # times what all results of a kind may have together, a single one may have in its rms error


@dataclass(frozen=True)
class Verdict:
    """The worst of all results.

    Args:
        ratio: largest or rms error over plain torch's; None where there was nothing to compare.
        problem: what is wrong, or None. status: what that makes of it, "wrong" or "not run".
    """

    ratio: float | None
    problem: str | None = None
    status: str = "wrong"


def check(draws: Iterable[Implementation]) -> Verdict:
    """Runs one implementation on each draw of a case's arguments and compares outputs and gradients.

    The errors of all draws are pooled, and those of results whose names have the first word in common; a single wrong
    one among many is found by its own.
    """
    pooled: dict[str, Errors] = {}
    alone: dict[str, Errors] = {}
    numbers: dict[str, int] = {}
    near: dict[str, bool] = {}
    limit = 0.0
    for implementation in draws:
        if implementation.expected is None:
            return Verdict(None)
        limit = implementation.limit
        implementation.prepare()
        torch.manual_seed(SEED)
        got = _results(implementation)
        plain, exact = implementation.expected()
        for name in exact:
            word = name.partition(" ")[0]
            errors = Errors()
            try:
                errors.add(got[name], plain[name], exact[name])
            except ValueError as error:
                return Verdict(None, f"{name}: {error}")
            pooled.setdefault(word, Errors()).include(errors)
            if name != word and exact[name].numel() >= _FEW:
                alone.setdefault(name, Errors()).include(errors)
            numbers[word] = numbers.get(word, 0) + exact[name].numel()
            near[word] = near.get(word, True) and _near(got[name], exact[name], implementation)
    worst, culprit = 0.0, ""
    for word, errors in pooled.items():
        if numbers[word] < _FEW and near[word]:
            continue
        for kind, ratio in zip(("largest", "rms"), errors.ratios(), strict=True):
            if not math.isnan(worst) and not ratio <= worst:
                worst, culprit = ratio, f"{kind} error of {word}"
    if not worst <= limit:
        return Verdict(worst, f"{culprit} is {worst:.3g} times plain torch's, at most {limit:g} is right")
    for name, errors in alone.items():
        ratio = errors.ratios()[1]
        if not ratio <= _ALONE * limit:
            return Verdict(
                ratio, f"rms error of {name} is {ratio:.3g} times plain torch's, at most {_ALONE * limit:g} is right"
            )
    return Verdict(worst)


def _near(got: torch.Tensor, exact: torch.Tensor, implementation: Implementation) -> bool:
    """Within a few units in the last place of the dtype that was computed with."""
    unit = torch.finfo(implementation.computed_in or next(iter(implementation.leaves.values())).dtype).eps
    error = (got.double() - exact).abs().max()
    return bool(error <= _UNITS * unit * exact.abs().max())


def _results(implementation: Implementation) -> Tensors:
    outputs = (implementation.checked or implementation.forward)()
    gradients = implementation.backward(outputs)
    found = {f"y{index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"d{name}": gradient for name, gradient in zip(implementation.leaves, gradients, strict=True)}
