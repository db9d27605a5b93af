"""The losses behind a frozen head: against the reference, in any chunks, and never with all logits at once."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_cases import assert_equal_up_to_rounding, device_for, error_ratios, why_not
from loss_cases import PARTS, linear

from echolora_kernels.losses import echo_distillation_linear, echo_distillation_rows
from echolora_kernels.ops.echo_distillation.linear import CHUNK_BYTES, chunk_rows_for


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 8])
def test_chunks(kernels, chunk, bias, routed):
    case = linear(kernels, bias=bias, routed=routed, kd_detach="none", kd_weight=0.3, temperature=1.7, chunk_rows=chunk)
    assert_equal_up_to_rounding(case.results(kernels), case.results("reference"))


@pytest.mark.parametrize("mode", ["on", "none", "off"])
@pytest.mark.parametrize("num_items", [None, 0, 11, torch.tensor(11)])
def test_modes_and_divisors(kernels, mode, num_items):
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(device_for(kernels))
    case = linear(kernels, kd_detach=mode, num_items=num_items)
    assert_equal_up_to_rounding(case.results(kernels), case.results("reference"))


def test_it_is_rows_behind_a_product(backend):
    case = linear(backend, bias=True)
    head = torch.nn.functional.linear
    want = echo_distillation_rows(
        head(case.off, case.weight, case.bias), head(case.on, case.weight, case.bias), case.targets, backend="reference"
    )
    for got, expected in zip(case.call(backend), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_gradcheck(kernels):
    case = linear(kernels, 4, 11, 3, bias=True, kd_detach="none", chunk_rows=3).leaves()
    call = lambda off, on: replace(case, off=off, on=on).call(kernels).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, (case.off, case.on), fast_mode=kernels == "triton")


def test_only_the_total_is_differentiable(backend):
    for routed in (True, False):
        losses = linear(backend, routed=routed).leaves().call(backend)
        assert [part.requires_grad for part in losses if part is not None] == ([True] + [False] * (3 if routed else 1))


def test_a_second_backward_and_any_incoming_gradient(kernels):
    case = linear(kernels, kd_detach="none").leaves()
    loss = case.call(kernels).loss
    first = torch.autograd.grad(loss, (case.off, case.on), torch.full_like(loss, -3.0), retain_graph=True)
    first[0].mul_(5)
    second = torch.autograd.grad(loss * -3, (case.off, case.on))
    torch.testing.assert_close(first[0], 5 * second[0])
    torch.testing.assert_close(first[1], second[1])


def test_only_what_asks_gets_a_gradient(kernels):
    case = linear(kernels, kd_detach="none", chunk_rows=3)
    want = case.results("reference")
    for name in ("off", "on"):
        leaf = getattr(case, name).clone().requires_grad_()
        (got,) = torch.autograd.grad(replace(case, **{name: leaf}).call(kernels).loss, leaf)
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-12)


def test_no_gradient_no_work(kernels, monkeypatch):
    """The products of the backward pass are not computed, and the weight may then be one that trains."""
    case = linear(kernels)
    want, products, mm = case.call("reference"), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *arguments, **options: products.append(1) or mm(*arguments, **options))
    got = case.call(kernels)
    with torch.no_grad():
        trained = replace(case.leaves(), weight=case.weight.clone().requires_grad_()).call(kernels)
    assert len(products) == 2 and not got.loss.requires_grad and not trained.loss.requires_grad
    for other in (got, trained):
        torch.testing.assert_close(torch.stack(other), torch.stack(want), rtol=1e-12, atol=0)


def test_nothing_is_changed_and_nothing_is_left_unwritten(kernels, monkeypatch):
    case = linear(kernels, 9, bias=True, kd_detach="none", chunk_rows=4)
    tensors = [case.off, case.on, case.weight, case.bias, case.targets]
    before = [tensor.clone() for tensor in tensors]
    want = case.results(kernels)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        got = case.results(kernels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert not got["off"][::3].any() and not got["on"][::3].any()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_strided_hidden_states_and_head(kernels):
    case = linear(kernels, 9, kd_detach="none", chunk_rows=4)
    both = torch.cat([case.off, case.on], 1)
    strided = replace(case, off=both[:, :5], on=both[:, 5:], weight=case.weight.t().contiguous().t())
    assert_equal_up_to_rounding(strided.results(kernels), case.results("reference"))


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_no_targets(backend, count, routed):
    case = linear(backend, count, routed=routed)
    found = replace(case, targets=torch.full_like(case.targets, -100)).results(backend)
    assert not any(value.any() for value in found.values())
    assert found["off"].shape == (count, 5) and len(found) == (6 if routed else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype(backend, dtype):
    if backend != "reference" and (reason := why_not(backend, dtype)):
        pytest.skip(reason)
    case = linear(backend, bias=True, dtype=torch.float32, near=0.2)
    with torch.autocast(case.off.device.type, dtype):
        got = case.results(backend)
    narrow = case.to(dtype).results("reference")
    assert got["off"].dtype == torch.float32 and got["loss"].dtype == torch.float32
    for name in PARTS:
        torch.testing.assert_close(got[name], narrow[name], rtol=1e-2, atol=1e-3)
    for name in ("off", "on"):
        assert (got[name] - narrow[name]).abs().max() < 0.05 * narrow[name].abs().max()


def test_small_gradients_survive_float16(kernels):
    """A mean's would fall below the smallest number where the loss is only scaled up afterwards."""
    case = linear(kernels, 9, 300, dtype=torch.float16, num_items=2**14)
    leaves = case.leaves()
    got = torch.autograd.grad(leaves.call(kernels).loss * 2**14, (leaves.off, leaves.on))
    wide = case.to(torch.float64).leaves()
    want = torch.autograd.grad(wide.call("reference").loss * 2**14, (wide.off, wide.on))
    for ours, exact in zip(got, want, strict=True):
        assert (ours - exact).abs().max() < 4e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch(kernels, dtype):
    if reason := why_not(kernels, dtype):
        pytest.skip(reason)
    draws = []
    for _ in range(8):
        case = linear(kernels, 12, 400, 64, dtype=dtype, near=0.2, kd_detach="none", chunk_rows=5)
        draws.append((case.results(kernels), case.results("reference"), case.to(torch.float64).results("reference")))
    joined = [{name: torch.stack([draw[i][name] for draw in draws]) for name in PARTS} for i in range(3)]
    for i in range(3):
        joined[i]["gradients"] = torch.stack([draw[i][name] for draw in draws for name in ("off", "on")])
    for name, (largest, rms) in error_ratios(*joined).items():
        assert largest <= 1.5 and rms <= 1.5, (name, largest, rms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_chunks_are_a_function_of_vocabulary_and_dtype(dtype):
    for vocabulary in (1, 32000, 49152, 128256, 262144):
        chunk = chunk_rows_for(vocabulary, dtype)
        size = 2 * chunk * vocabulary * dtype.itemsize
        assert chunk >= 64 and (size <= CHUNK_BYTES or chunk == 64)
        assert size > CHUNK_BYTES * 0.9 or vocabulary == 1


PEAK = """
import resource, torch
from echolora_kernels.losses import echo_distillation_linear
torch.set_num_threads(1)
rows, width, vocabulary = 512, 8, 131072
hidden = [torch.randn(rows, width).bfloat16().requires_grad_() for _ in range(2)]
weight, targets = torch.randn(vocabulary, width).bfloat16(), torch.randint(vocabulary, (rows,))

def step(count):
    parts = [h[:count] for h in hidden]
    echo_distillation_linear(*parts, weight, targets[:count], backend={backend!r}).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = step(2)
print(step(rows) - before)
"""


def test_all_logits_are_never_there():
    """Of two branches they would be 256 MB, and as much for their gradient; a chunk of them is 64."""
    if reason := why_not("cpp"):
        pytest.skip(reason)
    root = Path(__file__).resolve().parents[2]
    grown = {}
    for backend in ("cpp", "reference"):
        command = [sys.executable, "-c", PEAK.format(backend=backend)]
        environment = os.environ | {"PYTHONPATH": str(root)}
        grown[backend] = float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert grown["cpp"] < 100 and grown["reference"] > 500, grown


BAD = {
    "hidden_off 1-D": ({"hidden_off": torch.zeros(5)}, ValueError, "hidden_off"),
    "hidden_on shape": ({"hidden_on": torch.zeros(4, 3)}, ValueError, "hidden_on"),
    "hidden_on dtype": ({"hidden_on": torch.zeros(5, 3).half()}, TypeError, "hidden_on"),
    "weight width": ({"weight": torch.zeros(6, 4)}, ValueError, "hidden_off"),
    "weight dtype": ({"weight": torch.zeros(6, 3).double()}, TypeError, "weight"),
    "weight device": ({"weight": torch.zeros(6, 3, device="meta")}, ValueError, "weight"),
    "bias shape": ({"bias": torch.zeros(5)}, ValueError, "bias"),
    "targets shape": ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, "targets"),
    "targets dtype": ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "targets"),
    "chunk_rows": ({"chunk_rows": 0}, ValueError, "chunk_rows"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
    "weight trains": ({"weight": torch.zeros(6, 3, requires_grad=True)}, ValueError, "weight"),
    "bias trains": ({"bias": torch.zeros(6, requires_grad=True)}, ValueError, "bias"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(changes, error, name, backend):
    device = device_for(backend)
    hidden, targets = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    arguments = {"hidden_off": hidden, "hidden_on": hidden, "weight": torch.zeros(6, 3), "targets": targets, **changes}
    arguments = {k: v.to(device) if k in ("hidden_off", "hidden_on", "targets") else v for k, v in arguments.items()}
    for which in ("weight", "bias"):
        tensor = arguments.get(which)
        if tensor is not None and tensor.device.type == "cpu":
            arguments[which] = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
    with pytest.raises(error, match=f"^{name}: got .*wants"):
        echo_distillation_linear(**arguments, backend=backend)


def test_a_head_that_trains_is_told_what_to_call(backend):
    case = linear(backend)
    with pytest.raises(ValueError, match=r"weight: .*frozen head; .*echo_distillation_rows"):
        replace(case, weight=case.weight.requires_grad_()).call(backend)
