"""One case after the other: built, checked, timed; what is wrong gets no time."""

from __future__ import annotations

import datetime
import fnmatch
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import floor
from .cases import Case
from .check import Verdict, check
from .memory import launches, peak_megabytes
from .problem import Implementation, Problem, told
from .rates import Rates
from .timing import Timer, Times

_DRAWS = 4


@dataclass(frozen=True)
class Row:
    """What became of one implementation of one case in one phase; the columns of the CSV in this order.

    Args:
        case ... rows: as in `Case`; d_out: one number, or several with + between.
        status: "ok", "wrong" or "not run"; why: the reason of the latter two, or a note.
        milliseconds: median. low, high: the quartiles, in milliseconds. iqr: high - low.
        base: the implementation of the same case and phase that over_base and added compare with.
        over_base: milliseconds / the base's. added: milliseconds - the base's.
        floor: least milliseconds at the device's own rates. over_floor: milliseconds / floor.
        peak_mb: 10^6 bytes. launches: on a GPU.
        error: worst error over plain torch's, against float64.
    """

    case: str
    kind: str
    model: str
    part: str
    method: str | None
    rank: int | None
    dropout: float | None
    echo: bool | None
    dtype: str
    rows: int | None
    d_in: int | None
    d_out: str
    phase: str
    implementation: str
    status: str
    why: str = ""
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    iqr: float | None = None
    rounds: int | None = None
    timer: str | None = None
    base: str | None = None
    over_base: float | None = None
    added: float | None = None
    floor: float | None = None
    over_floor: float | None = None
    peak_mb: float | None = None
    launches: int | None = None
    error: float | None = None
    device: str = ""
    torch: str = ""
    version: str = ""
    date: str = ""


@dataclass
class Bench:
    """How to measure.

    Args:
        timer: of the device. rates: of the device, or None for no floor.
        phases: of each case. implementations: shell patterns of names to keep, besides the base; empty for all.
        left_out: name -> why an implementation is not even tried.
        rounds, seconds: as in `Timer.compare`.
        memory: also measure peaks and count launches.
        stop_at: `time.monotonic()` after which the cases that are left are not run.
        stamp: device, torch, version of every row.
    """

    timer: Timer
    rates: Rates | None
    phases: Sequence[str]
    implementations: Sequence[str] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int | None = None
    seconds: float = 1.0
    memory: bool = True
    stop_at: float | None = None
    stamp: dict[str, Any] = field(default_factory=dict)

    def run(self, case: Case) -> list[Row]:
        """All rows of a case; an error in building it, or in an implementation, is a row that says so."""
        if self.stop_at is not None and time.monotonic() > self.stop_at:
            return [self._row(case, "all", "all", "not run", "the time limit was reached")]
        try:
            problem = case.build(self.timer.device)
        except Exception as error:  # of drawing the arguments, or of whatever library builds a layer
            return [self._failed(case, "all", error)]
        rows = [
            self._row(case, "all", name, "not run", why)
            for name, why in problem.absent.items()
            if wanted(name, problem, self.implementations)
        ]
        verdicts = {}
        for name, implementation in problem.implementations.items():
            if name in self.left_out:
                rows.append(self._row(case, "all", name, "not run", self.left_out[name]))
            elif wanted(name, problem, self.implementations):
                verdicts[name] = judge(case, name, implementation, self.timer.device)
        right = {name: problem.implementations[name] for name, verdict in verdicts.items() if verdict.problem is None}
        for name, verdict in verdicts.items():
            if verdict.problem is not None:
                rows.append(self._row(case, "all", name, verdict.status, verdict.problem, error=verdict.ratio))
        for phase in self.phases:
            try:
                rows += self._phase(case, phase, problem, right, verdicts)
            except Exception as error:  # of a kernel that has passed its check, so most likely no memory
                rows.append(self._failed(case, phase, error))
        return rows

    def _failed(self, case: Case, phase: str, error: Exception) -> Row:
        return self._row(case, phase, "all", _status(error), told(error))

    def _phase(
        self,
        case: Case,
        phase: str,
        problem: Problem,
        right: dict[str, Implementation],
        verdicts: dict[str, Verdict],
    ) -> Iterator[Row]:
        times = self.timer.compare(right, phase, self.rounds, self.seconds, as_run=case.kind == "step") if right else {}
        base = times.get(problem.base or "")
        least = None
        if self.rates is not None and phase in problem.stages:
            least = floor.milliseconds(problem.stages[phase], self.rates, case.dtype)
        for name, of in times.items():
            implementation = right[name]
            peak = count = None
            if self.memory:
                peak = peak_megabytes(implementation, phase, self.timer.device)
                count = launches(implementation, phase, self.timer.device)
            yield self._row(
                case,
                phase,
                name,
                "ok",
                "; ".join(filter(None, (implementation.note, of.note))),
                peak_mb=peak,
                launches=count,
                error=verdicts[name].ratio,
                floor=least,
                over_floor=of.median / least if least else None,
                base=problem.base,
                **_compared(of, base),
            )

    def _row(self, case: Case, phase: str, implementation: str, status: str, why: str, **found) -> Row:
        return Row(
            case.name,
            case.kind,
            case.model,
            case.part,
            case.method,
            case.rank,
            case.dropout,
            case.echo,
            case.dtype,
            case.rows_on(self.timer.device),
            case.d_in,
            "+".join(map(str, case.widths)) if case.kind in ("layer", "quantised") else str(sum(case.widths)),
            phase,
            implementation,
            status,
            why,
            date=datetime.date.today().isoformat(),
            **found,
            **self.stamp,
        )


def wanted(name: str, problem: Problem, patterns: Sequence[str]) -> bool:
    """Whether an implementation is the base, or one that the patterns name; without patterns all are wanted."""
    return not patterns or name == problem.base or any(fnmatch.fnmatchcase(name, each) for each in patterns)


def release(device: torch.device) -> None:
    """Gives back what a case has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def judge(case: Case, name: str, implementation: Implementation, device: torch.device) -> Verdict:
    """`check`, where an exception is a verdict too.

    Errors that are too large are looked at again over several draws: the largest of a single one is a matter of luck.
    """
    try:
        verdict = check([implementation])
        if verdict.problem is None or verdict.ratio is None:
            return verdict
        return check(case.build(device, seed).implementations[name] for seed in range(_DRAWS))
    except Exception as error:  # whatever a broken kernel or a peer that has changed does
        return Verdict(None, told(error), _status(error))


def _compared(of: Times, base: Times | None) -> dict[str, Any]:
    low, high = of.quartiles
    return {
        "milliseconds": of.median,
        "low": low,
        "high": high,
        "iqr": high - low,
        "rounds": len(of.milliseconds),
        "timer": of.timer,
        "over_base": None if base is None else of.median / base.median,
        "added": None if base is None else of.median - base.median,
    }


def _status(error: Exception) -> str:
    return "not run" if isinstance(error, torch.OutOfMemoryError) else "wrong"
