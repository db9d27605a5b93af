"""How often the kernels are launched: a fusion that falls apart shows here."""

import pytest
import torch
from linear_cases import SITES
from triton_cases import NORM, make

from echolora_kernels.ops.echo_lora_linear.launch import Launch

FORWARD = ["shrink_fwd_kernel", "linear_fwd_kernel"]
BACKWARD = ["adapter_bwd_kernel", "lora_a_bwd_kernel", "input_bwd_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_two_forward_and_three_backward(launches, site, dora, p):
    make(site=site, dora=dora, p=p).results("triton")
    assert launches == (NORM if dora else []) + FORWARD + BACKWARD


def test_no_gradient_no_backward(launches):
    make(dora=True).results("triton", ())
    assert launches == [*NORM, *FORWARD]


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
        assert launches[len(NORM + FORWARD) :] == kernels, needs


def test_a_thick_adapter_reads_the_gradient_twice(launches):
    make(r=65).results("triton")
    assert launches == [*FORWARD, "shrink_fwd_kernel", *BACKWARD]


def test_nothing_is_launched_for_an_empty_batch(launches):
    make(n=0).results("triton")
    assert launches == []


def test_the_matrix_instructions_see_ds_in_the_dtype_of_x(monkeypatch):
    """It is summed in float32, in which they are slower."""
    seen, run = {}, Launch.run

    def record(planned, device, **tensors):
        if "ds" in tensors:
            seen[planned.kernel.fn.__name__] = tensors["ds"].dtype
        run(planned, device, **tensors)

    monkeypatch.setattr(Launch, "run", record)
    make(dtype=torch.float16).results("triton")
    assert seen == dict(zip(BACKWARD, (torch.float32, torch.float16, torch.float16), strict=True))
