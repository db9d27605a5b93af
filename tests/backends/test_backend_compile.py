"""The registered operators: opcheck, and torch.compile against eager, gradients included."""

from dataclasses import replace

import pytest
import torch
from linear_cases import SEED, SITES, make

from echolora_kernels.ops.echo_lora_linear import operators
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout


@pytest.fixture(autouse=True)
def _no_stale_graphs():
    torch.compiler.reset()


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(torch.float64, torch.float64), (torch.float16, torch.float32)])
@pytest.mark.parametrize(
    ("n", "site", "dora", "p"),
    [(2, None, False, 0.0), (2, "output", True, 0.3), (2, "adapter_input", False, 0.3), (0, "output", True, 0.3)],
)
def test_operators_pass_opcheck(backend, n, site, dora, p, dtype, lora_dtype):
    case = make(backend, n=n, t=3, d_in=5, d_out=6, site=site, dora=dora, p=p, dtype=lora_dtype)
    case = replace(case, **{name: getattr(case, name).to(dtype) for name in ("x", "weight", "bias")})
    for name, tensor in case.tensors().items():
        tensor.requires_grad_(name != "weight")
    seed = Dropout.draw(p, case.x.device).seed
    arguments = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.magnitude, case.delta, case.mask, seed)
    rest = (backend, site or "output", case.scaling, p, "exact", dora)
    torch.library.opcheck(operators.forward_operator, (*arguments, *rest))


@pytest.mark.parametrize(("trained", "kept"), [(("lora_b",), False), (("lora_a", "lora_b"), True)])
def test_x_is_kept_for_those_that_read_it(backend, trained, kept):
    """As in eager mode; and the gradients are those of eager mode."""
    case = make(backend, n=2, t=3, d_in=5, d_out=6)
    tensors = {name: tensor.detach() for name, tensor in case.tensors().items()}
    leaves = {name: tensors[name].requires_grad_() for name in ("x", *trained)}
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        call = torch.compile(lambda case: case.call(backend), fullgraph=True, backend="aot_eager")
        y = call(replace(case, **tensors))
    assert (tensors["x"].data_ptr() in held) == kept
    want = case.results(backend)
    for name, gradient in zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.dy), strict=True):
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_one_graph_equals_eager(backend, site, dora, p, calls):
    compiled = torch.compile(lambda case: case.call(backend), fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (4, 7):
        case = make(backend, n=2, t=t, d_in=5, d_out=6, site=site, dora=dora, p=p)
        want = case.results(backend)
        eager = list(calls)
        calls.clear()
        leaves = {name: tensor.detach().requires_grad_(name != "weight") for name, tensor in case.tensors().items()}
        torch.manual_seed(SEED)
        y = compiled(replace(case, **leaves))
        names = [name for name in leaves if name != "weight"]
        gradients = torch.autograd.grad(y, [leaves[name] for name in names], case.dy)
        assert torch.equal(y, want["y"])
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.equal(gradient, want[name]), name
        assert calls == eager
        calls.clear()


def test_inductor_round_the_operator(backend, device):
    """The default compiler, with something to fuse on both sides."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter's kernels are no different from what aot_eager calls")
    case = make(backend, n=2, t=4, d_in=5, d_out=6, site="output", dora=True, dtype=torch.float32)
    leaves = {name: tensor.detach().requires_grad_(name != "weight") for name, tensor in case.tensors().items()}

    def block(case):
        return torch.sigmoid(replace(case, x=case.x * 2).call(backend)) + 1

    names = [name for name in leaves if name != "weight"]
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        y = function(replace(case, **leaves))
        results.append([y, *torch.autograd.grad(y, [leaves[name] for name in names], case.dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_new_shapes_need_no_new_graph(backend):
    case = make(backend, site="output", dora=True)
    compiled = torch.compile(lambda case: case.call(backend), fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for n, t in ((4, 30), (4, 31), (4, 50), (6, 50), (7, 40)):  # no two sizes of a case are equal
        other = make(backend, n=n, t=t, site="output", dora=True)
        compiled(replace(case, x=other.x, delta=other.delta, mask=other.mask, dy=other.dy))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
