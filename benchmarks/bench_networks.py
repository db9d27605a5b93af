"""Milliseconds for the echo networks of all target modules, forward and backward, on this CPU.

    python benchmarks/bench_networks.py [--threads 2] [--rounds 30]

Three ways take turns in one process: a module after the other, each with its own parameters, by torch's operators; the
same operators on flat parameters (backend "reference"); and the kernels ("cpp"). Each is first checked against float64.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from echolora_kernels.functional import echo_networks

# name: d, widths of the target modules, m
SHAPES = {
    "SmolLM2-135M": (576, [576, 192, 192, 1536, 576] * 4, 64),
    "Llama-3-8B": (4096, [4096, 1024, 1024, 4096, 14336, 14336, 4096] * 4, 64),
}


class Problem:
    """Flat arguments of `echo_networks` and a gradient of each Delta."""

    def __init__(self, d: int, widths: list[int], m: int, samples: int) -> None:
        total, self.widths = sum(widths), widths
        shapes = [(samples, d), (2 * len(widths) * m, d), (total, m), (total, m), (total,), (len(widths),)]
        self.u, *parameters = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
        self.flat = [parameter.requires_grad_() for parameter in parameters]
        down, *up, scale = (parameter.detach() for parameter in self.flat)
        halves = [half.clone().requires_grad_() for half in down.split(m)]
        split = [[part.clone().requires_grad_() for part in parameter.split(widths)] for parameter in up]
        scales = [each.clone().requires_grad_() for each in scale]
        self.modules = list(zip(halves[::2], halves[1::2], *split, scales, strict=True))
        self.ddelta = [torch.randn(samples, width) for width in widths]

    def ways(self) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
        """Name -> the gradients of all parameters."""

        def one_by_one():
            deltas = [
                scale * torch.sigmoid(F.linear(torch.tanh(F.linear(self.u, u1)), u2, c))
                * F.linear(torch.tanh(F.linear(self.u, w1)), w2)
                for w1, u1, w2, u2, c, scale in self.modules
            ]  # fmt: skip
            return torch.autograd.grad(deltas, [each for module in self.modules for each in module], self.ddelta)

        def flat(backend):
            deltas = echo_networks(self.u, *self.flat, self.widths, backend=backend)
            return torch.autograd.grad(deltas, self.flat, self.ddelta)

        return {"modules": one_by_one, "flat": lambda: flat("reference"), "kernels": lambda: flat("cpp")}

    def check(self) -> None:
        """Raise where a way's gradients are not those of float64."""
        exact = [tensor.detach().double().requires_grad_() for tensor in self.flat]
        deltas = echo_networks(self.u.double(), *exact, self.widths, backend="reference")
        exact = torch.autograd.grad(deltas, exact, [gradient.double() for gradient in self.ddelta])
        ways = self.ways()
        by_module = zip(*[iter(ways["modules"]())] * 6, strict=True)
        w1, u1, *rest, scales = zip(*by_module, strict=True)
        halves = torch.cat([half for pair in zip(w1, u1, strict=True) for half in pair])
        for got in ([halves, *map(torch.cat, rest), torch.stack(scales)], ways["flat"](), ways["kernels"]()):
            for ours, want in zip(got, exact, strict=True):
                assert (ours - want).abs().max() < 1e-4 * want.abs().max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':14} {'N':>3}  modules ms  flat  kernels  (over modules)")
    for name, (d, widths, m) in SHAPES.items():
        for samples in (4, 8):
            problem = Problem(d, widths, m, samples)
            problem.check()
            found: dict[str, list[float]] = {way: [] for way in problem.ways()}
            for _ in range(arguments.rounds):
                for way, run in problem.ways().items():
                    started = time.perf_counter()
                    run()
                    found[way].append(1e3 * (time.perf_counter() - started))
            one, flat, kernels = map(statistics.median, found.values())
            print(f"{name:14} {samples:3} {one:11.2f} {flat / one:4.2f}x {kernels / one:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
