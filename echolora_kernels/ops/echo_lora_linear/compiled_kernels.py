"""The C++ and CUDA kernels as sets, `kernels.Kernels`: products with W0 by the vendor's GEMM, the rest by our library.

The vendor's product comes first and our kernels add to it while it is in the cache. csrc/library.cpp says what each
operator computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import BackendUnavailable
from .dropout import Dropout
from .echo import Echo
from .kernels import AdapterGradients
from .projection import Projection
from .rows import accumulator_dtype, add_product, without_autocast

_SITES = {"none": 0, "adapter_input": 1, "rank": 2, "output": 3}


class CompiledKernels:
    """The library's operators for tensors on one kind of device.

    Args:
        name: the backend's, for messages.
        device_type: "cpu" or "cuda".
        rounds_s: whether S is in x's dtype whatever the adapters are in; else wider adapters keep it wider.
        fused: whether the library has linear_forward and linear_backward for that device. With them z is the vendor's
            product alone, rounded once, and the backward pass adds what S B^T contributes to the gain's gradient.
    """

    max_rank = 256

    def __init__(self, name: str, device_type: str, rounds_s: bool, fused: bool) -> None:
        self.name, self.device_type, self.rounds_s, self.fused = name, device_type, rounds_s, fused

    def want_runnable(self, x: torch.Tensor) -> None:
        """Raise BackendUnavailable where no kernel can compute with `x`."""
        if x.device.type != self.device_type:
            raise BackendUnavailable(
                f"x: got device {x.device}, wants a {self.device_type} tensor for the {self.name} backend"
            )

    def s_dtype(self, x_dtype: torch.dtype, lora_dtype: torch.dtype) -> torch.dtype:
        """x's dtype where the adapters have it, or where S is rounded; else the accumulator's."""
        return x_dtype if self.rounds_s or lora_dtype == x_dtype else accumulator_dtype(x_dtype)

    def small(self, rows: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
        """No layer: launching from C++ takes no time to speak of."""
        return False

    def dora_norm(
        self,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        magnitude: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """D0; see `Kernels`."""
        wide = accumulator_dtype(torch.promote_types(weight.dtype, lora_a.dtype))
        if not self.fused:  # W0 contiguous, as wide as the result; adapters in its dtype or its accumulator's
            weight = (weight.to(wide) if wide == torch.float64 else weight).contiguous()
            lora_a, lora_b = _thin(lora_a, weight.dtype), _thin(lora_b, weight.dtype)
        norm, gain = _operators().dora_norm.default(weight, lora_a, lora_b, scaling, _dense(magnitude, wide))
        return norm, None if magnitude is None else gain

    def shrink(
        self,
        x: torch.Tensor,
        a: torch.Tensor,
        scaling: float,
        *,
        dropout: Dropout,
        gain: torch.Tensor | None = None,
        site: str = "none",
        delta: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """F1; see `Kernels`."""
        wide = accumulator_dtype(x.dtype)
        echo = (_SITES[site], _dense(delta, wide), _dense(mask, wide))
        return _operators().shrink.default(
            x, _thin(a, x.dtype), scaling, *_drawn(dropout), _dense(gain, wide), *echo
        )  # fmt: skip

    def linear_product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        s: torch.Tensor,
        lora_b: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        gain: torch.Tensor | None,
        delta: torch.Tensor | None,
        mask: torch.Tensor | None,
        dropout: Dropout,
        store_z: bool,
        shape: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """F2; see `Kernels`."""
        wide = accumulator_dtype(x.dtype)
        y, z, base = self._products(x, weight, gain, dropout, store_z)
        z, base = z.flatten(0, -2), None if base is None else base.flatten(0, -2)
        _operators().linear_epilogue.default(
            s, _thin(lora_b, x.dtype), z, base, _dense(gain, wide), _dense(bias, wide), _dense(delta, wide),
            _dense(mask, wide), y, store_z and not self.fused,
        )  # fmt: skip
        return _shaped(y, shape), z if store_z else None

    def expand(
        self,
        s: torch.Tensor,
        lora_b: torch.Tensor,
        base: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        gain: torch.Tensor | None,
        in_place: bool,
        store_z: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """F2 behind a finished product; see `Kernels`."""
        wide = accumulator_dtype(base.dtype)
        y = base if in_place else torch.empty_like(base)
        z = base.clone() if store_z and not self.fused else base  # which is then written to
        _operators().linear_epilogue.default(
            s, _thin(lora_b, base.dtype), z, None, _dense(gain, wide), _dense(bias, wide), None, None,
            y.unsqueeze(0), store_z and not self.fused,
        )  # fmt: skip
        return y, z if store_z else None

    def linear_forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        *,
        bias: torch.Tensor | None,
        gain: torch.Tensor | None,
        echo: Echo | None,
        dropout: Dropout,
        store_z: bool,
        shape: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """F1 and F2; see `Kernels`."""
        wide = accumulator_dtype(x.dtype)
        y, z, base = self._products(x, weight, gain, dropout, store_z)
        site, delta, mask = (0, None, None) if echo is None else (_SITES[echo.site], echo.delta, echo.mask)
        s = _operators().linear_forward.default(
            x, _thin(lora_a, x.dtype), _thin(lora_b, x.dtype), scaling, *_drawn(dropout), site, _dense(delta, wide),
            _dense(mask, wide), z, base, _dense(gain, wide), _dense(bias, wide), y,
        )  # fmt: skip
        return s, _shaped(y, shape), z.flatten(0, -2) if store_z else None

    def _products(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        gain: torch.Tensor | None,
        dropout: Dropout,
        store_z: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """y, for the epilogue to write; the product of what the gain applies to; and of x where that is another."""
        base = None
        with without_autocast(x):
            if gain is not None and dropout.on_base:
                base = F.linear(x, weight)
                x = _operators().drop.default(x, *_drawn(dropout)).view(x.shape)
            z = F.linear(x, weight)
        return torch.empty_like(z) if store_z else z, z, base

    def adapter_backward(
        self,
        dy: torch.Tensor,
        s: torch.Tensor | None,
        lora_b: torch.Tensor,
        scaling: float,
        *,
        gain: torch.Tensor | None,
        z: torch.Tensor | None,
        mask: torch.Tensor | None,
        need_ds: bool,
        need_lora_b: bool,
        need_bias: bool,
        need_gain: bool,
        need_delta: bool,
    ) -> AdapterGradients:
        """B1; see `Kernels`."""
        wide, needs = accumulator_dtype(dy.dtype), (need_ds, need_lora_b, need_bias, need_gain, need_delta)
        sums = _operators().adapter_backward.default(
            dy, s, _thin(lora_b, dy.dtype), scaling, _dense(gain, wide), z, _dense(mask, wide), *needs, self.fused
        )
        return _needed(sums, needs)

    def linear_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor | None,
        weight: torch.Tensor | None,
        s: torch.Tensor | None,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor,
        scaling: float,
        *,
        gain: torch.Tensor | None,
        z: torch.Tensor | None,
        delta: torch.Tensor | None,
        mask: torch.Tensor | None,
        dropout: Dropout,
        lora_dtype: torch.dtype,
        need_ds: bool,
        need_lora_b: bool,
        need_bias: bool,
        need_gain: bool,
        need_delta: bool,
    ) -> tuple[AdapterGradients, torch.Tensor | None, torch.Tensor | None]:
        """B1, B2 and B3; see `Kernels`."""
        wide, needs = accumulator_dtype(dy.dtype), (need_ds, need_lora_b, need_bias, need_gain, need_delta)
        dx = of_dropped = None
        if weight is not None:
            dx, of_dropped = self._input_products([dy], [weight], [gain], dropout)
        *sums, da = _operators().linear_backward.default(
            dy, s, _thin(lora_b, dy.dtype), scaling, _dense(gain, wide), z, _dense(mask, wide), x,
            None if dx is None or lora_a is None else _thin(lora_a, dy.dtype), *_drawn(dropout), _dense(delta, wide),
            of_dropped, dx, *needs,
        )  # fmt: skip
        return _needed(sums, needs), None if x is None else da.to(lora_dtype), dx

    def lora_a_backward(
        self,
        x: torch.Tensor,
        ds: torch.Tensor,
        *,
        dropout: Dropout,
        delta: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """B2; see `Kernels`."""
        wide = accumulator_dtype(x.dtype)
        da = _operators().lora_a_backward.default(x, ds, *_drawn(dropout), _dense(delta, wide), _dense(mask, wide))
        return da.to(dtype)

    def input_product(
        self,
        dy: torch.Tensor,
        weight: torch.Tensor,
        ds: torch.Tensor,
        lora_a: torch.Tensor,
        *,
        dropout: Dropout,
        gain: torch.Tensor | None,
    ) -> torch.Tensor:
        """B3; see `Kernels`."""
        return self._input_product([dy], [weight], [gain], ds, lora_a, dropout)

    def adapter_input_gradient(
        self, ds: torch.Tensor, lora_a: torch.Tensor, *, dropout: Dropout, dtype: torch.dtype
    ) -> torch.Tensor:
        """B3 without its product; see `Kernels`."""
        dx = ds.new_empty((len(ds), lora_a.shape[1]), dtype=dtype)
        _operators().input_epilogue.default(ds, _thin(lora_a, dtype), None, *_drawn(dropout), False, dx)
        return dx

    def group_input_product(
        self,
        dys: list[torch.Tensor],
        projections: Sequence[Projection],
        ds: list[torch.Tensor],
        stacked_ds: torch.Tensor,
        *,
        gains: Sequence[torch.Tensor | None],
        dropout: Dropout,
    ) -> torch.Tensor:
        """B3 for projections of one input; see `Kernels`."""
        lora_a = torch.cat([_thin(p.lora_a, dys[0].dtype) for p in projections])
        return self._input_product(dys, [p.weight for p in projections], gains, stacked_ds, lora_a, dropout)

    def _input_product(
        self,
        dys: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        gains: Sequence[torch.Tensor | None],
        ds: torch.Tensor,
        lora_a: torch.Tensor,
        dropout: Dropout,
    ) -> torch.Tensor:
        dx, of_dropped = self._input_products(dys, weights, gains, dropout)
        dx = dx.flatten(0, -2)
        of_dropped = None if of_dropped is None else of_dropped.flatten(0, -2)
        _operators().input_epilogue.default(ds, _thin(lora_a, dx.dtype), of_dropped, *_drawn(dropout), True, dx)
        return dx

    def _input_products(
        self,
        dys: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        gains: Sequence[torch.Tensor | None],
        dropout: Dropout,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The products with W0 that dX adds up, and those of them that the dropout mask applies to."""
        dx: torch.Tensor | None = None
        of_dropped: torch.Tensor | None = None
        for dy, weight, gain in zip(dys, weights, gains, strict=True):
            if gain is not None and dropout.on_base:
                of_dropped = add_product(of_dropped, dy, weight, gain - 1)
                gain = None
            dx = add_product(dx, dy, weight, gain)
        assert dx is not None
        return dx, of_dropped


def _needed(sums: Sequence[torch.Tensor], needs: Sequence[bool]) -> AdapterGradients:
    """The library's sums, which are empty where they were not asked for."""
    return AdapterGradients(*(sum_ if need else None for sum_, need in zip(sums, needs, strict=True)))


def _operators() -> Any:
    return torch.ops.echolora


def _shaped(y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """y in that shape, and no view, which autograd would not let the caller overwrite."""
    return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)


def _dense(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A vector or an echo as the library takes it."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def _thin(adapter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A or B in the dtype of the elements or of the accumulator."""
    wide = accumulator_dtype(dtype)
    return adapter if adapter.dtype in (dtype, wide) else adapter.to(wide)


def _drawn(dropout: Dropout) -> tuple[torch.Tensor | None, int, float]:
    return dropout.seed, dropout.drop_below, dropout.keep_scale


CPP = CompiledKernels("cpp", "cpu", rounds_s=False, fused=True)
CUDA = CompiledKernels("cuda", "cuda", rounds_s=True, fused=False)
