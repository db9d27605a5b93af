"""Forward + backward of one adapted linear on the CPU, side by side: PEFT, plain torch, addmm by hand, ours.

    python benchmarks/bench_cpu.py [--shapes NAMES_OR_MxKxN ...] [--threads 2] [--rounds 30] [--output FILE.json]

Prints the frozen linear in milliseconds and everything else as a multiple of it. All run in one process, in turn, and
medians are compared. Each is first checked against float64; one that is wrong gets no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import nn

import echolora_kernels
from echolora_kernels import functional, native

# rows, d_in, d_out
SHAPES = {
    "square": (1024, 1024, 1024),
    "smollm2-q": (1024, 576, 576),
    "smollm2-k": (1024, 576, 192),
    "smollm2-up": (1024, 576, 1536),
    "smollm2-down": (1024, 1536, 576),
    "llama-1b-q": (512, 2048, 2048),
    "llama-1b-k": (512, 2048, 512),
    "llama-1b-up": (512, 2048, 8192),
    "llama-1b-down": (512, 8192, 2048),
}
KINDS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)  # of the layer, of the adapters
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.06}  # of the largest element; PEFT rounds after every operation
WARM_UP = 3


@dataclass
class Layer:
    """What every implementation computes with: x, A, B and DoRA's magnitude want gradients, the weight is frozen."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    dy: torch.Tensor
    scaling: float = 2.0

    def leaves(self) -> dict[str, torch.Tensor]:
        names = ("x", "a", "b", "magnitude")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Layer:
        moved = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves().items()}
        rest = {"magnitude": None, "weight": self.weight.to(dtype), "dy": self.dy.to(dtype)}
        return Layer(**(rest | moved), scaling=self.scaling)


def make_layer(
    shape: tuple[int, int, int], rank: int, dora: bool, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> Layer:
    """Random values at the scale of a trained layer's."""
    rows, d_in, d_out = shape
    torch.manual_seed(0)
    weight = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    leaves = {
        "x": torch.randn(rows, d_in).to(dtype),
        "a": (torch.randn(rank, d_in) / d_in**0.5).to(adapter_dtype),
        "b": (torch.randn(d_out, rank) * 0.05).to(adapter_dtype),
        "magnitude": (weight.float().norm(dim=1) * (0.9 + 0.2 * torch.rand(d_out))).to(adapter_dtype) if dora else None,
    }
    leaves = {name: leaf if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()}
    return Layer(**leaves, weight=weight, dy=torch.randn(rows, d_out).to(dtype))


class AddmmLoRA(torch.autograd.Function):
    """LoRA as Unsloth and Axolotl write it: five products, the adapter's added in place."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        ctx.kinds = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        s = torch.mm(x, a.t())
        y = torch.mm(x, weight.t())
        y.addmm_(s, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, s)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s = ctx.saved_tensors
        ds = torch.mm(dy, b)
        db = torch.mm(dy.t(), s).mul_(ctx.scaling)
        da = torch.mm(ds.t(), x).mul_(ctx.scaling)
        dx = torch.mm(dy, weight)
        dx.addmm_(ds, a, alpha=ctx.scaling)
        return dx, None, da.to(ctx.kinds[0]), db.to(ctx.kinds[1]), None


def peft_forward(layer: Layer) -> Callable[[], torch.Tensor]:
    """PEFT's own layer, on the same leaves."""
    rank, d_in = layer.a.shape
    base = nn.Linear(d_in, len(layer.weight), bias=False)
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=layer.scaling * rank, target_modules=["0"], use_dora=layer.magnitude is not None
    )
    model = peft.inject_adapter_in_model(config, nn.Sequential(base))
    places = {"lora_A": layer.a, "lora_B": layer.b, "lora_magnitude_vector": layer.magnitude}
    leaves = {"x": layer.x}
    for name, parameter in model[0].named_parameters():
        kind = name.split(".")[0]
        if kind in places:
            parameter.data = places[kind].detach()
            leaves[kind] = parameter
    names = {"x": "x", "lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
    forward = lambda: model(layer.x)  # noqa: E731
    forward.leaves = {names[kind]: leaf for kind, leaf in leaves.items()}
    return forward


def implementations(layer: Layer) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> forward pass; the frozen linear is first. Those without `leaves` have the layer's."""

    def by(backend: str) -> Callable[[], torch.Tensor]:
        return lambda: functional.echo_lora_linear(
            layer.x, layer.weight, None, layer.a, layer.b, layer.scaling, magnitude=layer.magnitude, backend=backend
        )

    found = {
        "frozen": lambda: nn.functional.linear(layer.x, layer.weight),
        "peft": peft_forward(layer),
        "reference": by("reference"),
    }
    if layer.magnitude is None:
        found["addmm"] = lambda: AddmmLoRA.apply(layer.x, layer.weight, layer.a, layer.b, layer.scaling)
    return found | {"ours": by("cpp")}


def wrong(forward: Callable[[], torch.Tensor], layer: Layer, exact: dict[str, torch.Tensor]) -> str | None:
    """The first result that is not what float64 gives, and by how much."""
    leaves = getattr(forward, "leaves", None) or layer.leaves()
    y = forward()
    results = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), layer.dy), strict=True))}
    for name, value in exact.items():
        error = ((results[name].double() - value).abs().max() / value.abs().max()).item()
        if not error < TOLERANCES[layer.x.dtype]:
            return f"{name} is off by {error:.1e}"
    return None


def exact_results(layer: Layer) -> dict[str, torch.Tensor]:
    wide = layer.to(torch.float64)
    leaves = wide.leaves()
    y = functional.echo_lora_linear(
        wide.x, wide.weight, None, wide.a, wide.b, wide.scaling, magnitude=wide.magnitude, backend="reference"
    )
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), wide.dy), strict=True))}


def timed(forward: Callable[[], torch.Tensor], layer: Layer) -> float:
    """Seconds of one forward and backward pass, without the gradients of the last one."""
    for leaf in (layer.x, *(getattr(forward, "leaves", None) or layer.leaves()).values()):
        leaf.grad = None
    start = time.perf_counter()
    forward().backward(layer.dy)
    return time.perf_counter() - start


def compare(layer: Layer, rounds: int) -> dict:
    """Medians in milliseconds by implementation, and what was wrong with those that have none."""
    forwards, errors = implementations(layer), {}
    exact = exact_results(layer)
    for name in [name for name in forwards if name != "frozen"]:
        if reason := wrong(forwards[name], layer, exact):
            errors[name] = reason
            del forwards[name]
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for turn in range(WARM_UP + rounds):
        for name, forward in forwards.items():
            seconds = timed(forward, layer)
            if turn >= WARM_UP:
                times[name].append(seconds * 1e3)
    return {"milliseconds": {name: statistics.median(each) for name, each in times.items()}, "errors": errors}


def environment(threads: int) -> dict[str, str]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = {"torch": torch.__version__, "peft": peft.__version__, "echolora_kernels": echolora_kernels.__version__}
    return {"cpu": model, "instructions": native.cpu_instructions(), "threads": str(threads), **versions}


def shape_of(text: str) -> tuple[str, tuple[int, int, int]]:
    """A name of SHAPES, or ROWSxD_INxD_OUT."""
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        rows, d_in, d_out = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants ROWSxD_INxD_OUT or one of {', '.join(SHAPES)}") from None
    return text, (rows, d_in, d_out)


def cell(result: dict, name: str) -> str:
    if name in result["errors"]:
        return "wrong"
    if name not in result["milliseconds"]:
        return "-"
    return f"{result['milliseconds'][name] / result['milliseconds']['frozen']:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES.items()), metavar="SHAPE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if reason := native.why_unavailable():
        raise SystemExit(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    header = environment(options.threads)
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(f"rank {options.rank}; forward + backward as multiples of the frozen linear's; medians of {options.rounds}\n")
    columns = ("peft", "reference", "addmm", "ours")
    print(f"{'shape':<28}{'method':<8}{'layer':<10}{'adapters':<10}{'frozen ms':>10}", *(f"{c:>10}" for c in columns))
    results = []
    for (name, shape), dora, (dtype, adapter_dtype) in (
        (s, d, k) for s in options.shapes for d in (False, True) for k in KINDS
    ):
        layer = make_layer(shape, options.rank, dora, dtype, adapter_dtype)
        row = {"shape": name, "rows": shape[0], "d_in": shape[1], "d_out": shape[2], "rank": options.rank}
        row |= {"method": "dora" if dora else "lora", "dtype": str(dtype)[6:], "adapters": str(adapter_dtype)[6:]}
        row |= compare(layer, options.rounds)
        results.append(row)
        sizes = name if name not in SHAPES else f"{name} {'x'.join(map(str, shape))}"
        start = f"{sizes:<28}{row['method']:<8}{row['dtype']:<10}{row['adapters']:<10}"
        print(f"{start}{row['milliseconds']['frozen']:>10.2f}", *(f"{cell(row, c):>10}" for c in columns), flush=True)
        for which, reason in row["errors"].items():
            print(f"    {which}: {reason}")
    if options.output:
        options.output.write_text(json.dumps({"environment": header, "results": results}, indent=1) + "\n")
    if any(row["errors"] for row in results):
        raise SystemExit("some results are wrong, see above")


if __name__ == "__main__":
    main()
