"""Forward + backward of the losses on the CPU, from logits and from hidden states: plain PyTorch beside ours.

    python benchmarks/bench_loss.py [--shapes RxDxV ...] [--dtypes float32 bfloat16] [--threads 2] [--rounds 7]

Prints milliseconds of plain PyTorch, everything else as a multiple of it, and by how many MB the process grows at its
peak. All run in one process, in turn, and medians are compared; the peaks are those of a process each. Each is first
checked against float64 on its first rows; one that is wrong gets no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from echolora_kernels import losses, native

# rows of each branch, width, vocabulary: SmolLM2-135M, and Llama 3.2 1B
SHAPES = [*((rows, 576, 49152) for rows in (16, 64, 256, 512)), (64, 2048, 128256), (256, 2048, 128256)]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.03}  # of the largest element
CHECKED_ROWS = 4


@dataclass
class Problem:
    """Hidden states of both branches, the head, and the logits that they give."""

    hidden: list[torch.Tensor]
    weight: torch.Tensor
    targets: torch.Tensor
    logits: list[torch.Tensor]

    def first(self, count: int, dtype: torch.dtype) -> Problem:
        leaves = [
            [tensor.detach()[:count].to(dtype).requires_grad_() for tensor in tensors]
            for tensors in (self.hidden, self.logits)
        ]
        return Problem(leaves[0], self.weight.to(dtype), self.targets[:count], leaves[1])


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype) -> Problem:
    """ON differs a little from OFF, as an echo lets it."""
    rows, width, vocabulary = shape
    torch.manual_seed(0)
    weight = (3 * torch.randn(vocabulary, width) / width**0.5).to(dtype)
    off = torch.randn(rows, width)
    hidden = [tensor.to(dtype).requires_grad_() for tensor in (off, off + 0.2 * torch.randn(rows, width))]
    logits = [F.linear(tensor, weight).detach().requires_grad_() for tensor in hidden]
    return Problem(hidden, weight, torch.randint(vocabulary, (rows,)), logits)


def from_logits(backend: str) -> Callable[[Problem], list[torch.Tensor]]:
    def run(p: Problem) -> list[torch.Tensor]:
        loss = losses.echo_distillation_rows(*p.logits, p.targets, backend=backend).loss
        return [loss, *torch.autograd.grad(loss, p.logits)]

    return run


def head_and(backend: str) -> Callable[[Problem], list[torch.Tensor]]:
    def run(p: Problem) -> list[torch.Tensor]:
        logits = [F.linear(tensor, p.weight) for tensor in p.hidden]
        loss = losses.echo_distillation_rows(*logits, p.targets, backend=backend).loss
        return [loss, *torch.autograd.grad(loss, p.hidden)]

    return run


def fused(p: Problem) -> list[torch.Tensor]:
    loss = losses.echo_distillation_linear(*p.hidden, p.weight, p.targets, backend="cpp").loss
    return [loss, *torch.autograd.grad(loss, p.hidden)]


def products_alone(p: Problem) -> list[torch.Tensor]:
    """What the head costs whatever the loss is: logits of both branches in one product, and back."""
    with torch.no_grad():
        return [torch.mm(torch.mm(torch.cat(p.hidden), p.weight.t()), p.weight)]


# name -> implementation; the first of each half is what the others are compared with
FROM_LOGITS = {"logits: torch": from_logits("reference"), "logits: ours": from_logits("cpp")}
FROM_HIDDEN = {
    "hidden: torch": head_and("reference"),
    "hidden: F.linear + ours": head_and("cpp"),
    "hidden: ours": fused,
    "hidden: products alone": products_alone,
}
IMPLEMENTATIONS = FROM_LOGITS | FROM_HIDDEN


def wrong(name: str, problem: Problem, dtype: torch.dtype) -> str | None:
    """The first result that is not what float64 gives, and by how much."""
    if name == "hidden: products alone":
        return None
    plain = from_logits("reference") if name in FROM_LOGITS else head_and("reference")
    got = IMPLEMENTATIONS[name](problem.first(CHECKED_ROWS, dtype))
    for ours, exact in zip(got, plain(problem.first(CHECKED_ROWS, torch.float64)), strict=True):
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        if not error < TOLERANCES[dtype]:
            return f"off by {error:.1e}"
    return None


def compare(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict:
    """Medians in milliseconds by implementation, and what was wrong with those that have none."""
    problem = make_problem(shape, dtype)
    errors = {name: reason for name in IMPLEMENTATIONS if (reason := wrong(name, problem, dtype))}
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS if name not in errors}
    for turn in range(1 + rounds):
        for name in times:
            start = time.perf_counter()
            IMPLEMENTATIONS[name](problem)
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {"milliseconds": {name: statistics.median(each) for name, each in times.items()}, "errors": errors}


def peak(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """MB by which this process grows at its peak, its arguments and a step on a few rows not counted."""
    problem = make_problem(shape, dtype)
    IMPLEMENTATIONS[name](problem.first(2, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmHWM")
    IMPLEMENTATIONS[name](problem)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """In kB, as Linux counts this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_in_a_process(name: str, shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> float:
    sizes = "x".join(map(str, shape))
    command = [sys.executable, __file__, "--shapes", sizes, "--dtypes", str(dtype)[6:], "--threads", str(threads)]
    return float(subprocess.run([*command, "--peak", name], capture_output=True, check=True).stdout)


def shape_of(text: str) -> tuple[int, int, int]:
    try:
        rows, width, vocabulary = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants ROWSxWIDTHxVOCABULARY") from None
    return rows, width, vocabulary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="RxDxV")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=list(IMPLEMENTATIONS), help="print the peak of one implementation alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if reason := native.why_unavailable():
        raise SystemExit(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.shapes[0], getattr(torch, options.dtypes[0])))
        return
    print(
        f"{native.cpu_instructions()}, {options.threads} threads, torch {torch.__version__}; medians of {options.rounds}"
    )
    results = []
    for shape, dtype in ((s, getattr(torch, d)) for s in options.shapes for d in options.dtypes):
        row = {"rows": shape[0], "width": shape[1], "vocabulary": shape[2], "dtype": str(dtype)[6:]}
        row |= compare(shape, dtype, options.rounds)
        row["peaks"] = {name: peak_in_a_process(name, shape, dtype, options.threads) for name in row["milliseconds"]}
        results.append(row)
        print(f"\n{shape[0]} rows, d {shape[1]}, V {shape[2]}, {row['dtype']}")
        for half in (FROM_LOGITS, FROM_HIDDEN):
            base = row["milliseconds"].get(next(iter(half)))
            for name in half:
                if name in row["errors"]:
                    print(f"  {name:<26} wrong: {row['errors'][name]}")
                    continue
                milliseconds = row["milliseconds"][name]
                ratio = "" if base is None else f"{milliseconds / base:7.3f}"
                print(f"  {name:<26}{milliseconds:>10.1f} ms{ratio:>9}{row['peaks'][name]:>9.0f} MB", flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if any(row["errors"] for row in results):
        raise SystemExit("some results are wrong, see above")


if __name__ == "__main__":
    main()
