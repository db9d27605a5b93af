"""The echo signal that one adapted linear receives in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SITES = ("output", "adapter_input", "rank")


@dataclass(frozen=True, eq=False)
class Echo:
    """Per-sample echo vectors and the positions that receive them.

    ``M Delta``: position t of sample n receives ``mask[n, t] * delta[n]`` at the chosen site.

    Args:
        delta: [n_samples, width], floating; width is d_out for site "output", d_in for "adapter_input", r for "rank".
        mask: [n_samples, T], bool or floating; 1 where the position belongs to the answer.
        site: where the echo enters; docs/method.md "LoRA, site ..." (R for "output", O for the others).

    Raises:
        TypeError: an argument is not a tensor, or delta is not floating.
        ValueError: a shape, the site, or a device does not fit.
    """

    delta: torch.Tensor
    mask: torch.Tensor
    site: str = "output"

    def __post_init__(self) -> None:
        for name, value in (("delta", self.delta), ("mask", self.mask)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"echo.{name}: got {type(value).__name__}, wants a torch.Tensor")
            if value.ndim != 2:
                raise ValueError(f"echo.{name}: got shape {tuple(value.shape)}, wants 2 dimensions")
        if not self.delta.is_floating_point():
            raise TypeError(f"echo.delta: got dtype {self.delta.dtype}, wants a floating dtype")
        if not (self.mask.dtype == torch.bool or self.mask.is_floating_point()):
            raise TypeError(f"echo.mask: got dtype {self.mask.dtype}, wants bool or a floating dtype")
        if self.site not in SITES:
            raise ValueError(f"echo.site: got {self.site!r}, wants one of {', '.join(map(repr, SITES))}")
        if self.delta.shape[0] != self.mask.shape[0]:
            raise ValueError(
                f"echo.mask: got {self.mask.shape[0]} samples, wants {self.delta.shape[0]} as in echo.delta"
            )
        if self.delta.device != self.mask.device:
            raise ValueError(f"echo.mask: got device {self.mask.device}, wants {self.delta.device} as echo.delta")

    def spread(self) -> torch.Tensor:
        """M Delta at every position: [n_samples, T, width], in delta's dtype."""
        return self.mask.to(self.delta.dtype).unsqueeze(-1) * self.delta.unsqueeze(1)
