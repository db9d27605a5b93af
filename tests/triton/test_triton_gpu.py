"""What only a GPU can show: 16-bit accuracy, repeatability, graphs, memory. Skipped where there is none."""

import gc
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_cases import SITES, error_ratios
from triton_cases import make

from echolora_kernels.functional import echo_lora_linear
from echolora_kernels.verification.trials import Errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RATIO, DRAWS = 1.5, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rounded(case, dtype):
    """The case in `dtype`, and the same rounded numbers in float64."""
    narrow = case.to(dtype)
    return narrow, narrow.to(torch.float64)


def assert_as_exact(dtype, **sizes):
    """The largest error of a short vector in one draw is a matter of luck: those of all draws count."""
    pooled = defaultdict(Errors)
    for _ in range(DRAWS):
        case, exact = rounded(make(**sizes), dtype)
        got, plain, exact = case.results("triton"), case.results("reference"), exact.results("reference")
        for name, value in exact.items():
            pooled[name].add(got[name], plain[name], value)
    ratios = {name: errors.ratios() for name, errors in pooled.items()}
    assert max(max(pair) for pair in ratios.values()) <= RATIO, sorted(ratios.items(), key=lambda item: -max(item[1]))


def insist(monkeypatch, candidate):
    """Products by the "fused" kernel or around the "vendor"'s GEMM."""
    from echolora_kernels.ops.echo_lora_linear import candidates

    pick = -1 if candidate == "vendor" else 0
    monkeypatch.setattr(
        candidates, "choose", lambda problem, *_: candidates.Choice(candidates.possible(problem)[pick], "test")
    )


@pytest.mark.parametrize("candidate", ["fused", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("r", [8, 16, 128])
def test_as_exact_as_torch(monkeypatch, candidate, dtype, dora, site, r):
    """Largest and rms error of y and every gradient: at most 1.5 times plain torch's, both against float64."""
    insist(monkeypatch, candidate)
    assert_as_exact(dtype, n=4, t=250, d_in=1000, d_out=776, r=r, site=site, dora=dora)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [4, 16, 32])
@pytest.mark.parametrize("sizes", [(4, 250, 1000, 776), (3, 131, 576, 192), (2, 1024, 264, 512)])
def test_small_layers_as_exact_as_torch(small, launches, dtype, r, sizes):
    n, t, d_in, d_out = sizes
    assert_as_exact(dtype, n=n, t=t, d_in=d_in, d_out=d_out, r=r, bias=False)
    assert launches[-1].startswith("small") and len(launches) == DRAWS * (3 if small else 5), launches


def test_small_layers_drop_what_other_layers_drop(monkeypatch):
    """The mask is a function of seed, row and column, whichever kernel replays it."""
    from echolora_kernels.ops.echo_lora_linear import triton_kernels

    case = make(n=3, t=131, d_in=576, d_out=192, r=16, bias=False, p=0.3)
    want = case.results("triton")
    monkeypatch.setattr(triton_kernels, "small", lambda *_: True)
    for name, value in case.results("triton").items():
        torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dora", [False, True])
def test_a_hundred_repeats_are_bitwise_equal(dora):
    case = make(n=4, t=512, d_in=1024, d_out=1536, r=16, site="output", dora=dora, dtype=torch.bfloat16, p=0.1)
    first = case.results("triton")
    for _ in range(100):
        again = case.results("triton")
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_another_stream_gives_the_same():
    case = make(n=2, t=128, d_in=512, d_out=256, r=16, site="output", dtype=torch.bfloat16)
    want = case.results("triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = case.results("triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("site", [None, "output"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph_capture(small, site, p):
    """A captured forward and backward replays; with dropout each replay draws another mask."""
    case = make(n=2, t=128, d_in=512, d_out=256, r=16, site=site, bias=False, dtype=torch.bfloat16, p=p)
    x = case.x.clone().requires_grad_()
    a, b = case.lora_a.clone().requires_grad_(), case.lora_b.clone().requires_grad_()

    def step():
        y = replace(case, x=x, lora_a=a, lora_b=b).call("triton")
        return (y, *torch.autograd.grad(y, [x, a, b], case.dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    if p:
        assert not torch.equal(captured[0], first[0])
    else:
        assert all(torch.equal(t, before) for t, before in zip(captured, first, strict=True))
        assert all(torch.equal(t, eager) for t, eager in zip(captured, step(), strict=True))


def test_peak_memory_holds_no_copy_of_x_and_no_mask():
    n, t, d_in, d_out, r = 8, 1024, 4096, 1024, 16
    case = make(n=n, t=t, d_in=d_in, d_out=d_out, r=r, bias=False, dtype=torch.bfloat16, p=0.1)
    x = case.x.requires_grad_()
    a, b = case.lora_a.float().requires_grad_(), case.lora_b.float().requires_grad_()

    def forward():
        return echo_lora_linear(x, case.weight, None, a, b, 1.0, dropout_p=0.1, backend="triton")

    forward().backward(case.dy)
    x.grad = a.grad = b.grad = None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    rows, output = n * t, n * t * d_out * 2
    assert kept <= output + rows * r * 2 + 2**20
    assert peak <= kept + rows * r * 4 * 16 + 2**20
    y.backward(case.dy)
    assert torch.cuda.max_memory_allocated() - before <= output + rows * d_in * 2 + rows * r * 4 * 64 + 2**22


@pytest.mark.parametrize("candidate", ["fused", "vendor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_beyond_two_to_the_31_elements(monkeypatch, candidate, dtype):
    """The last rows, as exact as plain torch has them alone."""
    rows = 2**31 // 512 + 300
    if torch.cuda.mem_get_info()[0] < 5 * rows * 512 * dtype.itemsize:
        pytest.skip("needs more GPU memory")
    insist(monkeypatch, candidate)
    x = torch.zeros(1, rows, 512, dtype=dtype, device="cuda")
    x[0, -200:] = torch.randn(200, 512, device="cuda").to(dtype)
    last = make(n=1, t=200, d_in=512, d_out=512, r=8, dtype=dtype)
    last = replace(last, x=x[:, -200:])
    with torch.no_grad():
        got = {"y": replace(last, x=x).call("triton")[:, -200:]}
        plain, exact = ({"y": case.call("reference")} for case in (last, last.to(torch.float64)))
    ratios = error_ratios(got, plain, exact)
    assert max(ratios["y"]) <= RATIO, ratios


def test_compute_sanitizer_finds_nothing():
    """Out-of-bounds and misaligned accesses of every kernel, on ragged sizes."""
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed")
    code = """
from triton_cases import make
for dora, site, p in ((False, None, 0.0), (False, None, 0.3), (True, "output", 0.0), (True, "adapter_input", 0.3), (False, "rank", 0.3)):
    case = make(n=2, t=37, d_in=75, d_out=83, r=5, site=site, dora=dora, p=p, bias=dora, dtype=torch.bfloat16)
    case.results("triton")
torch.cuda.synchronize()
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run(
        [*command, "import torch" + code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
