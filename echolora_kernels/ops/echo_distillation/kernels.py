"""What a backend brings: the kernels that the losses are written in terms of."""

from __future__ import annotations

from typing import Protocol, cast

import torch

STATS = 7  # of a row: max, 1 / sum of exponentials, the same of the tempered ones, of OFF and of ON; the divergence


class Kernels(Protocol):
    """The kernels of one backend.

    Logits come as [n, T, V], any strides, float16, bfloat16, float32 or float64; targets as n * T contiguous int64.
    Sums are float32, or float64 for float64.
    """

    def want_runnable(self, x: torch.Tensor, name: str) -> None:
        """Raise BackendUnavailable where no kernel can compute with `x`, the argument `name`."""

    def forward(
        self, off: torch.Tensor, on: torch.Tensor | None, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the rows that have a target, and what `backward` wants to know of each row.

        Returns:
            [CE(off), CE(on), KL(softmax(on / tau) || softmax(off / tau))], [3], and [n * T, STATS].
        """

    def backward(
        self,
        off: torch.Tensor,
        on: torch.Tensor | None,
        targets: torch.Tensor,
        stats: torch.Tensor,
        temperature: float,
        scales: torch.Tensor,
        learns: tuple[bool, bool],
        d_off: torch.Tensor | None,
        d_on: torch.Tensor | None,
    ) -> None:
        """Writes the gradient of ``scales . sums``, which may lie where the logits do; rows without a target get zeros.

        Args:
            scales: [3], dtype of the sums. learns: whether the divergence has a gradient for OFF, for ON.
            d_off, d_on: [n, T, V], any strides, dtype of the logits; None where not wanted.
        """

    def forward_and_overwrite(
        self,
        off: torch.Tensor,
        on: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        scales: torch.Tensor,
        learns: tuple[bool, bool],
        needs: tuple[bool, bool],
    ) -> torch.Tensor:
        """`forward`, and then `backward` onto the logits of the branches that `needs` says.

        Returns:
            The sums, [3].
        """


def load(backend: str) -> Kernels:
    """The kernels of "triton" or "cpp"; imports what they need."""
    # statements, which torch.compile can trace
    if backend == "triton":
        from . import triton_losses

        return cast(Kernels, triton_losses)
    from . import compiled_losses

    return cast(Kernels, compiled_losses)
