"""The ways to compute one product, on arguments drawn for it, and whether each is right."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.echo_lora_linear import configs
from ..ops.echo_lora_linear.candidates import Choice, Problem, brief, choose, possible
from ..ops.echo_lora_linear.configs import Device, Tile
from ..verification.trials import LIMIT, Errors

# rows whose results are compared with float64: from the first and the last tiles, and from between
_CHECKED = 256


@dataclass(frozen=True)
class Way:
    """A candidate and the tile of its Triton kernel, "KERNEL/NAME"."""

    candidate: str
    tile: str

    def __str__(self) -> str:
        return f"{self.candidate} {self.tile}"


def ways(problem: Problem, device: Device) -> list[Way]:
    """All that can compute `problem` on such a device."""
    found = []
    for candidate in possible(problem):
        for kernel, names in _tiles(problem, candidate, device.arch).items():
            listed = configs.candidates(kernel, _dtype(problem), device.arch)
            found += [Way(candidate, f"{kernel}/{name}") for name in names if name in listed]
    return found


def by_rule(problem: Problem, device: Device) -> Way:
    """What runs without a table."""
    candidate = choose(problem).candidate
    rows, cols = problem.m, problem.n if problem.product == "forward" else problem.k
    is_brief = brief(problem.m, problem.n, problem.k, problem.dtype)
    if candidate == "fused" and _describable(problem, device.arch) and not is_brief:
        kernel = "descriptor"
        tile = configs.descriptor_tile(rows, cols, problem.rank, _dtype(problem), device, rich=problem.dora)
    else:
        load = _load(problem, candidate)
        kernel, tile = "matmul", configs.matmul_tile(rows, cols, _dtype(problem), device, load)
    return Way(candidate, f"{kernel}/{_name(kernel, tile, _dtype(problem), device.arch)}")


def _tiles(problem: Problem, candidate: str, arch: str) -> dict[str, tuple[str, ...]]:
    tiles = {"matmul": configs.matmul_tiles(_load(problem, candidate))}
    if candidate == "fused" and _describable(problem, arch):
        tiles["descriptor"] = configs.descriptor_tiles(problem.rank, rich=problem.dora)
    return tiles


def _load(problem: Problem, candidate: str) -> str:
    added = candidate != "fused"
    if problem.product == "forward":
        return configs.forward_load(problem.dora, echo=False, added=added)
    return configs.input_load(problem.rank, dropout=False, added=added)


def _describable(problem: Problem, arch: str) -> bool:
    """Whether the dispatch takes tensor descriptors for it: those of B3 know no gain, and rows have 16-byte strides."""
    if problem.product == "input-gradient" and problem.dora:
        return False
    aligned = problem.n * _dtype(problem).itemsize % 16 == 0 == problem.k * _dtype(problem).itemsize % 16
    return aligned and configs.uses_descriptors(problem.rank, _dtype(problem), arch)


def _name(kernel: str, tile: Tile, dtype: torch.dtype, arch: str) -> str:
    return next(name for name, listed in configs.candidates(kernel, dtype, arch).items() if listed == tile)


def _dtype(problem: Problem) -> torch.dtype:
    return getattr(torch, problem.dtype)


class Product:
    """One product's arguments, as a layer has them in training: adapters in float32 beside 16-bit weights.

    Args:
        problem: what to compute. device: where. seed: of the numbers, which are about 1 in the results.
    """

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem, self._device = problem, device
        self._generator = torch.Generator(device).manual_seed(seed)
        dtype = _dtype(problem)
        adapters = torch.float32 if dtype.itemsize < 4 else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        forward = problem.product == "forward"
        inner, outer = (problem.k, problem.n) if forward else (problem.n, problem.k)
        self._rows = self._draw(problem.m, inner).to(dtype)
        self._weight = (self._draw(problem.n, problem.k) / inner**0.5).to(dtype)
        self._inner = (self._draw(problem.m, problem.rank) / problem.rank**0.5).to(dtype)
        # the kernels round adapters to the rows' dtype, so that numbers with no more digits are fair
        thin = self._draw(outer, problem.rank).to(dtype).to(adapters)
        self._thin = thin if forward else thin.t().contiguous()  # B [N, r], or A [r, K]
        self._gain = 0.5 + torch.rand(problem.n, device=device, generator=self._generator).to(wide)

    def run(self, way: Way) -> tuple[torch.Tensor, ...]:
        """y, and z where DoRA stores it; or dX."""
        from ..ops.echo_lora_linear.dropout import Dropout
        from ..ops.echo_lora_linear.triton_products import input_product, linear_product

        problem = self.problem
        arguments = (self._rows.unsqueeze(0), self._weight, self._inner, self._thin)
        gain, choice = self._gain if problem.dora else None, Choice(way.candidate, "tuning", way.tile)
        if problem.product == "input-gradient":
            return (input_product(*arguments, dropout=Dropout(), gain=gain, choice=choice),)
        nothing: dict[str, Any] = {"bias": None, "delta": None, "mask": None, "dropout": Dropout()}
        shape = (1, problem.m, problem.n)
        y, z = linear_product(*arguments, gain=gain, store_z=problem.dora, shape=shape, choice=choice, **nothing)
        return (y[0],) if z is None else (y[0], z)

    def error(self, way: Way) -> float:
        """The largest of the largest and rms errors, over those of plain torch in the same dtype, both against float64.

        Raises:
            ValueError: another dtype or shape than plain torch's.
        """
        self._poison()
        ratios: list[float] = []
        for result, plain, exact in zip(self.run(way), *self._compared, strict=True):
            errors = Errors()
            errors.add(result[self._checked], plain, exact)
            ratios += errors.ratios()
        return max(ratios, key=lambda ratio: (ratio != ratio, ratio))  # NaN is the worst

    @functools.cached_property
    def _checked(self) -> torch.Tensor:
        if self.problem.m <= _CHECKED:
            return torch.arange(self.problem.m, device=self._device)
        edge, between = _CHECKED // 4, _CHECKED // 2
        middle = torch.randperm(self.problem.m - 2 * edge, device=self._device, generator=self._generator)[:between]
        ends = torch.arange(edge, device=self._device)
        return torch.cat([ends, edge + middle.sort().values, self.problem.m - edge + ends])

    @functools.cached_property
    def _compared(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        # plain torch has all rows too: how a GEMM splits its sums depends on how many there are
        plain = self._plain(self._rows, self._inner, _dtype(self.problem), self._gain.dtype)
        checked = self._rows[self._checked], self._inner[self._checked]
        return tuple(each[self._checked] for each in plain), self._plain(*checked, torch.float64, torch.float64)

    def _plain(
        self, rows: torch.Tensor, inner: torch.Tensor, dtype: torch.dtype, wide: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        """What plain torch makes of these rows."""
        rows, weight, inner, thin = (tensor.to(dtype) for tensor in (rows, self._weight, inner, self._thin))
        gain = self._gain.to(wide)
        if self.problem.product == "input-gradient":
            if self.problem.dora:
                rows = (rows * gain).to(dtype)
            return (rows @ weight + inner @ thin,)
        base = rows @ weight.t()
        y = base + inner @ thin.t()
        return ((y * gain).to(dtype), base) if self.problem.dora else (y,)

    def _poison(self) -> None:
        """NaN where the next results are likely to be allocated: what a kernel leaves unwritten shows."""
        cols = self.problem.n if self.problem.product == "forward" else self.problem.k
        two = [torch.empty(self.problem.m, cols, dtype=self._rows.dtype, device=self._device) for _ in range(2)]
        for tensor in two:
            tensor.fill_(float("nan"))

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, generator=self._generator)


def is_right(error: float) -> bool:
    """Whether that is within the rule for errors."""
    return error <= LIMIT
