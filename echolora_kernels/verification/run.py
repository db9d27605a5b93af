"""Every backend that can run here against float64, beside plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .. import backends
from ..backends import BACKENDS, Backend
from ..errors import BackendUnavailable
from ..ops.echo_lora_linear.kernels import load
from .suite import Check, checks
from .trials import LIMIT, Errors

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Row:
    """What became of one check.

    Args:
        ratios: result -> largest and rms error as multiples of plain torch's.
        problem: what went wrong apart from that. not_run: why it was not run.
    """

    operator: str
    backend: str
    device: str
    dtype: str
    options: str = ""
    shape: str = ""
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    problem: str | None = None
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; so also where it was not run."""
        return self.problem is None and all(ratio <= LIMIT for pair in self.ratios.values() for ratio in pair)

    def worst(self, which: int) -> tuple[str, float]:
        """The result whose largest (0) or rms (1) error stands out most, and that ratio."""
        # NaN, which compares with nothing, is the worst
        ratio = lambda name: self.ratios[name][which]  # noqa: E731
        name = max(self.ratios, key=lambda name: (ratio(name) != ratio(name), ratio(name)))
        return name, ratio(name)


@dataclass(frozen=True)
class Job:
    """One check by one backend in one dtype."""

    check: Check
    backend: str
    device: torch.device
    dtype: str

    def run(self) -> Row:
        """Does it. The generators of random numbers are left as they were."""
        errors: dict[str, Errors] = {}
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
                for draw in range(self.check.draws):
                    torch.manual_seed(draw)
                    trial = self.check.make(self.backend, self.device, getattr(torch, self.dtype))
                    for name, three in trial.compare().items():
                        # the losses are single numbers, whose errors are pooled, each at its own scale
                        errors.setdefault(name.partition(" ")[0], Errors()).add(*three)
        except Exception as error:  # whatever a broken kernel does: the other checks are still worth running
            return self._row(problem=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return self._row(ratios={name: of.ratios() for name, of in errors.items()})

    def _row(self, **found) -> Row:
        check = self.check
        return Row(check.operator, self.backend, str(self.device), self.dtype, check.options, check.shape, **found)


def plan(
    names: Sequence[str] | None = None, dtypes: Sequence[str] = DTYPES, quick: bool = False
) -> tuple[list[Job], list[Row]]:
    """What to run, and what cannot be.

    Args:
        names: backends that must be verified; None for all that can run here. The reference is plain torch, with which
            the others are compared.

    Raises:
        ValueError: a name or a dtype is unknown, or nothing can be compared with.
        BackendUnavailable: a named backend cannot run here.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, wants one of {', '.join(DTYPES)}")
    for name in names or ():
        if name == "reference":
            raise ValueError("backend: got 'reference', wants one of the others, which are compared with it")
        backends.choose("echo_lora_linear", name)
    jobs: list[Job] = []
    not_run: list[Row] = []
    for backend in BACKENDS:
        if backend.name == "reference" or (names and backend.name not in names) or backend.why_unavailable():
            continue
        for device in _devices(backend):
            interpreted = backend.name == "triton" and device.type == "cpu"
            if interpreted and quick and not names:
                slow = "Triton's interpreter takes minutes; name the backend to run it"
                not_run.append(Row("all", backend.name, str(device), "all", not_run=slow))
                continue
            wanted = checks(quick, small=interpreted)
            for operator in dict.fromkeys(check.operator for check in wanted):
                if operator not in backend.operators:
                    lacks = "the backend does not have it"
                    not_run.append(Row(operator, backend.name, str(device), "all", not_run=lacks))
            for dtype in dtypes:
                if reason := _why_not(backend.name, device, dtype):
                    not_run.append(Row("all", backend.name, str(device), dtype, not_run=reason))
                    continue
                here = [check for check in wanted if check.operator in backend.operators]
                jobs += [Job(check, backend.name, device, dtype) for check in here]
    return jobs, not_run


def _devices(backend: Backend) -> list[torch.device]:
    """The CPU, or one GPU of each kind."""
    on_gpu = backend.preferred_on == ("cuda",) and torch.cuda.is_available()
    if not on_gpu:
        return [torch.device("cpu")]
    kinds = {torch.cuda.get_device_name(index): index for index in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cuda", index) for index in sorted(kinds.values())]


def _why_not(backend: str, device: torch.device, dtype: str) -> str | None:
    try:
        load(backend).want_runnable(torch.empty(1, 1, 1, dtype=getattr(torch, dtype), device=device))
    except BackendUnavailable as error:
        return str(error)
    return None
