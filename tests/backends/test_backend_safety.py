"""What the operator must not do: read or write outside its arguments, change them, differ between two runs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from linear_cases import SITES, Case, assert_equal_up_to_rounding, make

from echolora_kernels.functional import echo_lora_linear


def fenced(tensor):
    """The same values with NaN all round, between rows and between columns."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    room = tensor.new_full([2 * size + 2 for size in tensor.shape], math.nan)
    view = room[tuple(slice(1, -1, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def rebuilt(case: Case, change) -> Case:
    names = [*case.tensors(), "dy"]
    return replace(case, **{name: change(getattr(case, name)) for name in names})


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_nan_around_every_input(backend, site, dora, p):
    case = make(backend, site=site, dora=dora, p=p)
    assert_equal_up_to_rounding(rebuilt(case, fenced).results(backend), case.results(backend))


@pytest.mark.parametrize("dora", [False, True])
def test_arguments_are_unchanged_and_a_second_backward_gives_the_same(backend, dora):
    case = make(backend, site="output", dora=dora, p=0.3, r=20, t=70)
    leaves = {name: tensor.requires_grad_(name != "weight") for name, tensor in case.tensors().items()}
    inputs = [tensor for name, tensor in leaves.items() if name != "weight"]
    before = [tensor.detach().clone() for tensor in (*leaves.values(), case.dy, case.mask)]
    y = case.call(backend)
    first = torch.autograd.grad(y, inputs, case.dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, case.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = (*leaves.values(), case.dy, case.mask)
    assert all(torch.equal(a.detach(), b) for a, b in zip(after, before, strict=True))


def test_two_runs_give_the_same_bits(backend):
    case = make(backend, n=3, t=50, d_in=80, d_out=90, r=5, site="output", dora=True, p=0.3, dtype=torch.float32)
    first, second = case.results(backend), case.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_result_may_be_overwritten(backend):
    case = make(backend, dora=True)
    leaves = [tensor.requires_grad_() for name, tensor in case.tensors().items() if name != "weight"]
    y = case.call(backend)
    y.mul_(2)
    gradients = torch.autograd.grad(y, leaves, case.dy)
    want = torch.autograd.grad(case.call("reference") * 2, leaves, case.dy)
    for got, expected in zip(gradients, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_double_backward_is_refused(backend):
    case = make(backend)
    x = case.x.requires_grad_()
    (dx,) = torch.autograd.grad(case.call(backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_incoming_gradients_of_any_strides(backend, site, dora):
    case = make(backend, site=site, dora=dora)
    n, t, d_out = case.dy.shape
    gradients = {
        "expanded": torch.ones((), dtype=torch.float64, device=case.dy.device).expand(n, t, d_out),
        "one row": case.dy[:1, :1].expand(n, t, d_out),
        "transposed": case.dy.transpose(1, 2).contiguous().transpose(1, 2),
        "samples last": case.dy.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "sliced": torch.cat([case.dy, case.dy], -1)[..., 5 : 5 + d_out],
    }
    for dy in gradients.values():
        this = replace(case, dy=dy)
        assert_equal_up_to_rounding(this.results(backend), this.results("reference"))


def _layouts(tensor):
    """The same values under other strides."""
    yield tensor
    yield tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    yield torch.cat([tensor, tensor], -2)[..., : tensor.shape[-2], :]
    yield fenced(tensor)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(1, 40)),
    site=st.sampled_from(SITES),
    dora=st.booleans(),
    layouts=st.lists(st.integers(0, 4), min_size=5, max_size=5),
)
def test_shapes_strides_ranks_and_sites(backend, sizes, site, dora, layouts):
    torch.manual_seed(0)
    case = make(backend, *sizes, site=site, dora=dora)
    names = ["x", "weight", "lora_a", "lora_b", "dy"]
    changed = {n: list(_layouts(getattr(case, n)))[i] for n, i in zip(names, layouts, strict=True)}
    # a single input or rank can make a norm, and so a gain, far from 1
    assert_equal_up_to_rounding(replace(case, **changed).results(backend), case.results("reference"), 1e-9)


@pytest.mark.parametrize("shape", [(0, 5, 19), (2, 0, 19)])
@pytest.mark.parametrize("site", SITES)
def test_empty_batches_give_zero_gradients(backend, shape, site):
    case = make(backend, n=shape[0], t=shape[1], site=site, dora=True, p=0.2)
    got = case.results(backend)
    assert got["y"].shape == (*shape[:-1], 21)
    for name, tensor in case.tensors().items():
        if name != "weight":
            assert got[name].shape == tensor.shape and not got[name].any(), name


def test_offsets_beyond_int32(backend, device):
    stride = 2**30
    try:
        room = torch.empty(3 * stride + 64, dtype=torch.float16, device=device)  # 6 GB, of which four pages are touched
    except RuntimeError:
        pytest.skip("no 6 GB of address space")
    x = room.as_strided((4, 16), (stride, 1))
    x.copy_(torch.randn(4, 16))
    w, a, b = (torch.randn(shape, dtype=torch.float16, device=device) for shape in ((24, 16), (3, 16), (24, 3)))
    dense = x.clone().requires_grad_()
    leaves = [x.detach().requires_grad_(), a.requires_grad_()]
    y, want = (echo_lora_linear(t, w, None, a, b, 1.0, backend=backend) for t in (leaves[0], dense))
    assert torch.equal(y, want)
    got = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(g, e) for g, e in zip(got, torch.autograd.grad(want.sum(), [dense, a]), strict=True))


def test_gradcheck_through_the_real_kernels(backend):
    for site, dora, p in (
        (None, False, 0.0),
        ("output", True, 0.3),
        ("adapter_input", True, 0.0),
        ("rank", False, 0.3),
    ):
        case = make(backend, n=2, t=2, d_in=5, d_out=4, r=3, site=site, dora=dora, p=p)
        # the norm of DoRA is a constant, so A and B only pass where there is no magnitude
        names = [n for n in case.tensors() if n != "weight" and not (dora and n in ("lora_a", "lora_b"))]

        def function(*values, case=case, names=names):
            torch.manual_seed(1)
            return replace(case, **dict(zip(names, values, strict=True))).call(backend)

        leaves = [getattr(case, name).requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, leaves)
