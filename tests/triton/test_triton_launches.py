"""How often the kernels are launched: a fusion that falls apart shows here."""

import pytest
import torch
from triton_cases import SITES, make

FORWARD = ["shrink_fwd_kernel", "linear_fwd_kernel"]
BACKWARD = ["adapter_bwd_kernel", "lora_a_bwd_kernel", "input_bwd_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_two_forward_and_three_backward(launches, site, dora, p):
    make(site=site, dora=dora, p=p).results("triton")
    assert launches == (["dora_norm_fwd_kernel"] if dora else []) + FORWARD + BACKWARD


def test_no_gradient_no_backward(launches):
    make(dora=True).results("triton", ())
    assert launches == ["dora_norm_fwd_kernel", *FORWARD]


def test_only_what_is_needed(launches):
    case = make(site="output", dora=True)
    expected = {
        ("lora_b",): BACKWARD[:1],
        ("magnitude",): BACKWARD[:1],
        ("delta",): BACKWARD[:1],
        ("lora_a",): BACKWARD[:2],
        ("x",): [BACKWARD[0], BACKWARD[2]],
        ("lora_a", "lora_b"): BACKWARD[:2],
    }
    for needs, kernels in expected.items():
        launches.clear()
        case.results("triton", needs)
        assert launches[3:] == kernels, needs


def test_a_thick_adapter_reads_the_gradient_twice(launches):
    make(r=65).results("triton")
    assert launches == [*FORWARD, "shrink_fwd_kernel", *BACKWARD]


def test_nothing_is_launched_for_an_empty_batch(launches):
    make(n=0).results("triton")
    assert launches == []


def test_only_the_magnitude_needs_a_saved_result():
    case = make(dora=True)
    size = case.dy.numel()
    for needs, saved in ((("magnitude",), 1), (("x", "lora_a", "lora_b"), 0)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            case.results("triton", needs)
        assert sizes.count(size) == saved, needs


def test_x_is_saved_as_the_callers_tensor_and_nothing_else_is_its_size():
    case = make(p=0.3, dora=True, site="output")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.results("triton")
    large = [t for t in saved if t.numel() == case.x.numel()]
    assert [t.data_ptr() for t in large] == [case.x.data_ptr()]
