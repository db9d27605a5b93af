"""Dropout as a kernel replays it: a probability, and a seed that stays on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DROP_BITS = 24


@dataclass(frozen=True)
class Dropout:
    """Probability p, the seed as a one-element int64 tensor on x's device (None where p is 0), and DoRA's mode.

    The seed stays on the device, so that drawing it neither waits for the device nor freezes into a CUDA graph.
    """

    p: float = 0.0
    seed: torch.Tensor | None = None
    dora: str = "exact"

    @classmethod
    def draw(cls, p: float, device: torch.device, dora: str = "exact") -> Dropout:
        """A new seed from torch's generator of `device`."""
        return cls(p, torch.randint(2**62, (1,), device=device), dora) if p > 0 else cls()

    @property
    def on_base(self) -> bool:
        """Whether DoRA's gain applies to the base product of the dropped input, as in PEFT."""
        return self.p > 0 and self.dora == "exact"

    @property
    def drop_below(self) -> int:
        """An element is dropped where its random number of `DROP_BITS` bits is below this."""
        return round(self.p * 2**DROP_BITS)

    @property
    def keep_scale(self) -> float:
        """The factor on what is kept."""
        return 1 / (1 - self.p)
