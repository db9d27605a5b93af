"""Models and batches for two ranks, and what one process makes of the batches of both."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import always_on, echo_model, pad, randomise, sample
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from echolora_kernels.integrations.blocks import decoder_blocks

MODES = ("two-pass", "shared")
WRAPPERS = ("ddp", "fsdp2")
# what each rank gets: other lengths, other numbers of answer tokens, a sample without any
SHARES = [[(5, 3), (8, 2)], [(3, 4), (6, 0), (4, 6)]]


def model(mode: str, kind: str = "peft", *, dora: bool = False, family: str = "llama", **choices):
    """The same on every rank; half of its steps are routed."""
    torch.manual_seed(7)
    half = {"echo_start_probability": 0.5, "echo_end_probability": 0.5}
    return echo_model(kind, always_on(step_mode=mode, **half, **choices), dora=dora, family=family)


def wrapped(echo, wrapper: str):
    """As a user wraps an `EchoLoRA`."""
    if wrapper == "ddp":
        return DistributedDataParallel(echo, find_unused_parameters=True)
    for block in decoder_blocks(echo.model)[1]:
        fully_shard(block)
    return fully_shard(echo)


def batches(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """This rank's batch, the batch of both, and the latter's number of answer tokens."""
    torch.manual_seed(100 + step)
    samples = [[sample(*lengths) for lengths in share] for share in SHARES]
    whole = pad(samples[0] + samples[1])
    return pad(samples[dist.get_rank()]), whole, int((whole["labels"][:, 1:] != -100).sum())


def set_routing(echo, routed: bool) -> None:
    """Move to the first step that is routed, or not."""
    echo.step = 0
    while echo.routed != routed:
        echo.step += 1


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(module) -> dict[str, torch.Tensor | None]:
    """By the names of the plain model."""
    return {
        name.removeprefix("module."): None if p.grad is None else full(p.grad)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def assert_same(got, wanted, tolerance: float = 1e-11) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None, name
        else:
            error = (got[name] - value).norm() / value.norm().clamp_min(1e-12)
            assert error < tolerance, f"{name}: relative error {error:.1e}"


__all__ = [
    "MODES",
    "WRAPPERS",
    "assert_same",
    "batches",
    "full",
    "gradients",
    "model",
    "randomise",
    "set_routing",
    "wrapped",
]
