"""The losses where a graph is traced or transformed: opcheck, torch.compile against eager, torch.func."""

from dataclasses import replace

import pytest
import torch
from loss_cases import linear, rows

from echolora_kernels.losses import echo_distillation, echo_distillation_rows
from echolora_kernels.ops.echo_distillation import operators


@pytest.fixture(autouse=True)
def _no_stale_graphs():
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("routed", [True, False])
def test_operators_pass_opcheck(kernels, routed, dtype):
    case = rows(kernels, 4, 11, routed=routed, dtype=dtype).leaves()
    torch.library.opcheck(operators.forward_operator, (case.off, case.on, case.targets, kernels, 1.5, True, True))
    case = linear(kernels, 4, 11, routed=routed, dtype=dtype, bias=True).leaves()
    constants = (kernels, 1.5, 0.3, True, True, 3, [True, routed])
    arguments = (case.off, case.on, case.weight, case.bias, case.targets, *constants)
    torch.library.opcheck(operators.linear_operator, arguments)


@pytest.mark.parametrize("make", [rows, linear])
@pytest.mark.parametrize("routed", [True, False])
def test_one_graph_equals_eager(backend, make, routed):
    compiled = torch.compile(lambda case: case.call(backend), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 7):
        case = make(backend, count, 11, routed=routed, kd_detach="none")
        want = case.results(backend)
        leaves = case.leaves()
        losses = compiled(leaves)
        inputs = [leaves.off, leaves.on] if routed else [leaves.off]
        gradients = torch.autograd.grad(losses.loss, inputs)
        assert torch.equal(losses.loss, want["loss"])
        for name, gradient in zip(("off", "on"), gradients, strict=False):
            torch.testing.assert_close(gradient, want[name], rtol=1e-13, atol=1e-15)


def test_labels_in_one_graph(backend, device):
    off = torch.randn(2, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([[-100, 3, 1, -100, 2], [4, -100, 0, 5, -100]], device=device)
    call = lambda off: echo_distillation(off, 2 * off, labels, backend=backend).loss  # noqa: E731
    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(off), call(off)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, off), torch.autograd.grad(want, off))


def test_inductor_round_the_operator(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter's kernels are no different from what aot_eager calls")
    case = linear(backend, 5, 40, 8, dtype=torch.float32)
    block = lambda off: replace(case, off=torch.tanh(off)).call(backend).loss * 3  # noqa: E731
    off = case.off.requires_grad_()
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        loss = function(off)
        results.append((loss, *torch.autograd.grad(loss, off)))
    torch.testing.assert_close(*results)


def test_transforms_take_the_reference(kernels, device):
    """Where no backend is named, as for the other operators."""
    case = rows(kernels, 4)
    call = lambda off: echo_distillation_rows(off, case.on, case.targets).loss  # noqa: E731
    want = case.results("reference")["off"]
    torch.testing.assert_close(torch.func.grad(call)(case.off), want)
