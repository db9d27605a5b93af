"""What one adapted linear takes of the host and of the GPU: PEFT's, ours after `fuse`, and the frozen one.

    python benchmarks/gpu/host.py --shape 1024x576x576 2048x4096x4096

Forward and backward, bfloat16 on a GPU, LoRA, called again and again without waiting for the GPU but once every 20 calls:
microseconds of the host, the least and the median; then those of the GPU, as a CUDA graph of ten. Needs PEFT.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from echolora_kernels import fuse

CALLS, TOGETHER, REPLAYS = 400, 20, 20


class Model(nn.Module):
    """One linear, which PEFT wraps."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def host(step: Callable[[], object], calls: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Microseconds until a call returns: the least, and the median."""
    for _ in range(TOGETHER):
        step()
    found = []
    for call in range(calls):
        if call % TOGETHER == 0:
            wait()
        started = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - started))
    return min(found), statistics.median(found)


def device(step: Callable[[], object]) -> float:
    """Microseconds of the GPU for one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step()
    found = []
    for _ in range(REPLAYS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        found.append(100 * begun.elapsed_time(ended))
    return statistics.median(found)


def steps(m: int, k: int, n: int, rank: int, where: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and one forward and backward of each implementation."""
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    x = torch.randn(1, m, k, device=where, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, m, n, device=where, dtype=dtype)

    def step(model: nn.Module) -> Callable[[], object]:
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(model(x), leaves, dy)

    yield "frozen", step(Model(k, n).to(where, dtype).requires_grad_(False))
    for wide in (True, False) if dtype != torch.float32 else (True,):
        config = LoraConfig(r=rank, target_modules=["linear"], lora_alpha=2 * rank)
        model = get_peft_model(Model(k, n).to(where, dtype), config, autocast_adapter_dtype=wide)
        kind = f"{'float32' if wide else 'bfloat16'} adapters"
        yield f"PEFT, {kind}", step(model)
        fuse(model, strict=True)
        yield f"fused, {kind}", step(model)


def sizes(text: str) -> tuple[int, int, int]:
    """Of MxKxN."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, wants MxKxN, such as 1024x576x576")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [(1024, 576, 576), (2048, 4096, 4096)]
    parser.add_argument("--shape", nargs="+", type=sizes, metavar="MxKxN", default=default)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    print("| rows x in x out | | host: least | median | GPU |\n| --- | --- | --- | --- | --- |")
    for shape in options.shape:
        for name, step in steps(*shape, options.rank, where):
            gc.collect()
            gc.disable()  # which would come in some of the calls
            least, median = host(step, options.calls, wait)
            gc.enable()
            gpu = f"{device(step):.0f}" if where == "cuda" else ""
            print(f"| {'x'.join(map(str, shape))} | {name} | {least:.0f} | {median:.0f} | {gpu} |", flush=True)


if __name__ == "__main__":
    main()
