"""Which kernels a pass calls, and what it saves: the same for every backend."""

import pytest
import torch
from linear_cases import SITES, make

from echolora_kernels.ops.echo_lora_linear.kernels import load

FORWARD = ["shrink", "linear_product"]
BACKWARD = ["adapter_backward", "lora_a_backward", "input_product"]


def forward(backend):
    return ["linear_forward"] if load(backend).fused else FORWARD


def backward(backend, *which):
    return ["linear_backward"] if load(backend).fused else [BACKWARD[i] for i in which or (0, 1, 2)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_two_forward_and_three_backward(backend, calls, site, dora, p):
    make(backend, t=2, site=site, dora=dora, p=p).results(backend)
    assert calls == (["dora_norm"] if dora else []) + forward(backend) + backward(backend)


def test_no_gradient_no_backward(backend, calls):
    make(backend, dora=True).results(backend, ())
    assert calls == ["dora_norm", *forward(backend)]


def test_only_what_is_needed(backend, calls):
    case = make(backend, site="output", dora=True)
    expected = {
        ("lora_b",): backward(backend, 0),
        ("magnitude",): backward(backend, 0),
        ("delta",): backward(backend, 0),
        ("lora_a",): backward(backend, 0, 1),
        ("x",): backward(backend, 0, 2),
        ("lora_a", "lora_b"): backward(backend, 0, 1),
    }
    for needs, kernels in expected.items():
        calls.clear()
        case.results(backend, needs)
        assert calls[1 + len(forward(backend)) :] == kernels, needs


def test_nothing_is_called_for_an_empty_batch(backend, calls):
    make(backend, n=0).results(backend)
    assert calls == []


def test_only_the_magnitude_needs_a_saved_result(backend):
    case = make(backend, dora=True)
    size = case.dy.numel()
    for needs, saved in ((("magnitude",), 1), (("x", "lora_a", "lora_b"), 0)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            case.results(backend, needs)
        assert sizes.count(size) == saved, needs


def test_x_is_saved_as_the_callers_tensor_and_nothing_else_is_its_size(backend):
    case = make(backend, p=0.3, dora=True, site="output")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.results(backend)
    large = [t for t in saved if t.numel() == case.x.numel()]
    assert [t.data_ptr() for t in large] == [case.x.data_ptr()]
