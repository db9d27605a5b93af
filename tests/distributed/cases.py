"""Models, wrappers and batches for two ranks, and what they are compared with."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from tiny import always_on, echo_model, pad, sample
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from echolora_kernels.integrations.blocks import decoder_blocks
from echolora_kernels.method.route import routed

MODES = ("two-pass", "shared")
WRAPPERS = ("ddp", "fsdp2")
# what each rank gets: other lengths, other numbers of answer tokens, a sample without any
SHARES = [[(5, 3), (8, 2)], [(3, 4), (6, 0), (4, 6)]]
_HALF = {"echo_start_probability": 0.5, "echo_end_probability": 0.5}
# steps 0, 1 and 2 are routed, not routed and routed
SEED = next(
    seed
    for seed in itertools.count()
    if [routed(always_on(**_HALF, seed=seed), step) for step in range(3)] == [True, False, True]
)


def model(mode: str, kind: str = "peft", *, start: int = 7, dora: bool = False, **choices):
    """The same on every rank for the same `start`."""
    torch.manual_seed(start)
    return echo_model(kind, always_on(step_mode=mode, seed=SEED, **_HALF, **choices), dora=dora)


def wrapped(echo, wrapper: str):
    """As a user wraps an `EchoLoRA`."""
    if wrapper == "ddp":
        return DistributedDataParallel(echo, find_unused_parameters=True)
    for block in decoder_blocks(echo.model)[1]:
        fully_shard(block)
    return fully_shard(echo, reshard_after_forward=wrapper == "fsdp2, root resharded")


def batches(step: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Each rank's batch, and the number of answer tokens of all of them."""
    torch.manual_seed(100 + step)
    parts = [pad([sample(*lengths) for lengths in share]) for share in SHARES]
    return parts, sum(int((part["labels"] != -100).sum()) for part in parts)


def alone(echo, step: int) -> None:
    """The gradients that one process gets from the batches of all, one after the other."""
    parts, items = batches(step)
    for part in parts:
        echo(**part, num_items_in_batch=items).loss.backward()


def together(module, step: int, *, size: int = 2) -> None:
    """This rank's part of the same; the wrappers average over ranks, which `size` undoes."""
    parts, items = batches(step)
    (module(**parts[dist.get_rank()], num_items_in_batch=items).loss * size).backward()


def trainable(module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def values(module, of=lambda p: p.detach()) -> dict[str, torch.Tensor | None]:
    """Of every trainable parameter, whole, by its name in the plain `EchoLoRA`."""
    found = {name.removeprefix("module."): of(p) for name, p in module.named_parameters() if p.requires_grad}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def gradients(module) -> dict[str, torch.Tensor | None]:
    return values(module, lambda p: p.grad)


def assert_same(got, wanted, tolerance: float = 1e-11) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] is None) == (value is None), f"{name}: got {got[name]}, wants {value}"
        if value is not None:
            error = float((got[name] - value).norm() / value.norm().clamp_min(1e-12))
            assert error < tolerance, f"{name}: relative error {error:.1e}"
