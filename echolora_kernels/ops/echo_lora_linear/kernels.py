"""What a backend brings: the kernels that autograd, groups and the registered operators are written in terms of.

Rows come as [n, T, width] of any strides. A backend need not know which tensor asks for a gradient, what is saved,
or which of these functions run in one pass: that is `passes`, `group` and `autograd`, the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from .dropout import Dropout
from .echo import Echo
from .projection import Projection


@dataclass
class AdapterGradients:
    """What one pass over dY yields, in the accumulator's dtype (ds also in S's); None where it was not asked for."""

    ds: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    delta: torch.Tensor | None = None


class Kernels(Protocol):
    """The kernels of one backend. M = n * T rows, K = d_in, N = d_out, r the rank."""

    # the largest rank that they serve
    max_rank: int
    # whether one layer's pass is one call, linear_forward or linear_backward; else it is put together from the others
    fused: bool

    def want_runnable(self, x: torch.Tensor) -> None:
        """Raise BackendUnavailable where no kernel can compute with `x`."""

    def s_dtype(self, x_dtype: torch.dtype, lora_dtype: torch.dtype) -> torch.dtype:
        """The dtype of what `shrink` returns for adapters of `lora_dtype` on an x of `x_dtype`."""

    def small(self, rows: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
        """Whether `small_forward` and `small_backward` serve a LoRA layer of these sizes, whose echo they need not know.

        Args:
            rows: x [n, T, K], or dY [n, T, N]. weight: [N, K].
        """

    def dora_norm(
        self,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        magnitude: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """D0: ``norm = || W0 + s B A ||_row`` and ``gain = magnitude / norm``, constants.

        Returns:
            norm, and the gain where a magnitude is given: [N], float32, or float64 where an argument is.
        """

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
        """F1: ``S = s (drop(x) (a * gain)^T + rank-space echo)``.

        Args:
            x: [n, T, K]. a: [r, K], any strides and floating dtype. scaling: s.
            dropout: probability and seed; the mask is a function of seed, row and column alone.
            gain: [K] or None, a factor on the columns of a.
            site: "adapter_input" adds mask * delta to drop(x), "rank" adds it to the product, "none" does neither.
            delta, mask: the echo, [n, K] or [n, r], and [n, T].

        Returns:
            S, [M, r], unit stride, in `s_dtype`.
        """

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
        """F2: ``y = g z + bias + mask delta`` with ``z = x W0^T + S B^T``.

        With DoRA and exact dropout, ``z = drop(x) W0^T + S B^T`` and ``y`` gains ``(x - drop(x)) W0^T``: PEFT's form.

        Args:
            x: [n, T, K]. weight: [N, K]. s: [M, r], unit stride, maybe some columns of a wider one. lora_b: [N, r].
            bias, gain: [N] or None; gain is contiguous.
            delta, mask: the echo at the output, [n, N] and [n, T], or None.
            dropout: as `shrink` got it; it only matters with a gain.
            store_z: also return z without S B^T, which `adapter_backward` reads for the magnitude's gradient.
            shape: of y, which is no view.

        Returns:
            y, and z [M, N], without S B^T, or None: contiguous, in x's dtype.
        """

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
        """F2 behind a finished product: ``y = g z + bias`` with ``z = base + S B^T``.

        Args:
            s: [M, r], unit stride. lora_b: [N, r]. base: [M, N], contiguous.
            bias, gain: [N] or None; gain is contiguous.
            in_place: write y into base. store_z: as in `linear_product`; never with in_place.

        Returns:
            y, [M, N], and z without S B^T, which is base itself, or None: contiguous, in base's dtype.
        """

    def small_forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        *,
        bias: torch.Tensor | None,
        dropout: Dropout,
        shape: tuple[int, ...],
        s: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`shrink` and `linear_product` of a layer that is `small`: S, written into `s` where it is given, and y."""

    def small_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        s: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        *,
        dropout: Dropout,
        base: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All gradients of a layer that is `small`.

        Args:
            s: [M, r], unit stride, as `small_forward` or `shrink` left it. dropout: as they got it.
            base: [M, K], contiguous, to add dX to, in place: that of other projections of the same input.

        Returns:
            dX [M, K], dA and dB, the last two in the adapters' dtype.
        """

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
        """`shrink` and `linear_product`: S, y and z. Only where `fused`; x may be [M, K] too."""

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
        """`adapter_backward`, `lora_a_backward` where x is given, `input_product` where weight is. Only where `fused`.

        Args:
            delta: the echo at the adapter's input, where x is given. mask: for it, or for need_delta.
            lora_dtype: of dA.

        Returns:
            The sums, dA [r, K] and dX in dY's shape. dY and x may be [M, width] too.
        """

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
        """B1: everything that is a sum over dY.

        ``dS = s (g * dY) B``, ``dB = (g * dY)^T S``, ``dbias = sum dY``, ``dg = sum dY * z``, ``dDelta = sum mask dY``.

        Args:
            dy: [n, T, N], also expanded; never written.
            s, z, mask: what `shrink` returned, for need_lora_b and need_gain; what `linear_product` did, for need_gain;
                and [n, T], for need_delta. Each may be None without its need.
            lora_b: [N, r]. scaling: s. gain: [N] or None.
            need_*: which sums.

        Returns:
            ds [M, r], contiguous, lora_b [N, r], bias [N], gain [N], delta [n, N].
        """

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
        """B2: ``dA = dS^T (drop(x) + mask delta)``, [r, K] in `dtype`.

        Args:
            x: [n, T, K]. ds: [M, r], contiguous, as `adapter_backward` returned it or several side by side.
            dropout: as `shrink` got it.
            delta, mask: the echo at the adapter's input, [n, K] and [n, T], or None.
        """

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
        """B3: ``dX = (g * dY) W0 + drop'(dS A)``, [M, K], contiguous, in dY's dtype.

        With DoRA and exact dropout ``dX = dY W0 + drop'(((g - 1) * dY) W0 + dS A)``.

        Args:
            dy: [n, T, N], also expanded; never written. weight: [N, K]. lora_a: [r, K].
            ds: [M, r], as `adapter_backward` returned it.
            dropout: as `shrink` got it. gain: [N] or None.
        """

    def adapter_input_gradient(
        self, ds: torch.Tensor, lora_a: torch.Tensor, *, dropout: Dropout, dtype: torch.dtype
    ) -> torch.Tensor:
        """B3 without its product: ``drop'(dS A)``, [M, K], contiguous, in `dtype`, which is x's.

        Args:
            ds: [M, r], as `adapter_backward` returned it. lora_a: [r, K]. dropout: as `shrink` got it.
        """

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
        """B3 for projections of one input: the sum of their dX, [M, K], contiguous, in dY's dtype.

        Args:
            dys: [n, T, N] each. ds: [M, r] each, as `adapter_backward` returned it; stacked_ds: side by side.
            gains: [N] or None each. dropout: as `shrink` got it.
        """


_loaded: dict[str, Kernels] = {}


def load(backend: str) -> Kernels:
    """The kernels of "triton", "cpp" or "cuda"; imports what they need."""
    if backend not in _loaded:  # an import statement costs microseconds each time, several times a layer
        _loaded[backend] = _imported(backend)
    return _loaded[backend]


def _imported(backend: str) -> Kernels:
    # statements, which torch.compile can trace
    if backend == "triton":
        from . import triton_kernels

        return cast(Kernels, triton_kernels)  # not fused, so without the two functions of that
    from .compiled_kernels import CPP, CUDA

    return cast(Kernels, CPP if backend == "cpp" else CUDA)  # nothing is small, so without the two functions of that
