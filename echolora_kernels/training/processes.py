"""The processes that take a run's steps together: which one this is, and everything they tell each other."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def launched() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun and accelerate launch tell them."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return rank, size, int(os.environ.get("LOCAL_RANK", 0))


class Processes:
    """This process among those of the run. One alone needs no `torch.distributed`, and nothing is sent.

    Every method but `share` and `seed` is to be called by all of them in the same order.

    Attributes:
        rank: from 0. size: how many there are. first: whether this is rank 0, which reads and writes the output.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Meet the others, unless a process group is there already; `device` is where this one computes."""
        self._device = device
        self._made = launched()[1] > 1 and not dist.is_initialized()
        if self._made:
            cuda = device.startswith("cuda")
            if cuda:
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if cuda else "gloo")
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.first = self.rank == 0

    def leave(self) -> None:
        """The end of a run that went well. After an error the process is to end: that is what tells the others."""
        if self._made:
            dist.destroy_process_group()

    def seed(self, seed: int, step: int) -> None:
        """Dropout of a step is a function of (seed, step, rank): a resumed run draws what the unbroken one drew."""
        torch.manual_seed(random.Random(f"{seed}/{step}/{self.rank}").getrandbits(63))

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`, as many as any other's or one more or less; maybe none."""
        return list(items[self.rank :: self.size])

    def sums(self, values: Iterable[float]) -> list[float]:
        """Each of `values`, as many in every process, summed over the processes."""
        values = list(values)
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return sums.tolist()

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute()` returns or raises in the first process, which alone runs it."""
        if self.size == 1:
            return compute()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = compute()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]

    @torch.no_grad()
    def copy_first(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give `parameters` the first process's values."""
        for parameter in parameters:
            if self.size > 1:
                dist.broadcast(parameter, src=0)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients up, in one message for each dtype. A parameter without one in any process keeps None."""
        if self.size == 1:
            return
        used = self.sums(parameter.grad is not None for parameter in parameters)
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            chosen = [p for p, uses in zip(parameters, used, strict=True) if uses and p.dtype == dtype]
            if chosen:
                parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen]
                flat = torch.cat(parts)
                dist.all_reduce(flat)
                for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
                    parameter.grad = part.view_as(parameter)
