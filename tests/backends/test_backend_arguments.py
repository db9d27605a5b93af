"""What a backend refuses, and that it says so by its own name."""

from dataclasses import replace

import pytest
import torch
from linear_cases import assert_equal_up_to_rounding, make, why_not

from echolora_kernels.errors import BackendUnavailable
from echolora_kernels.functional import echo_lora_linear
from echolora_kernels.ops.echo_lora_linear.kernels import load


def test_other_devices_are_refused(backend):
    x = torch.empty(3, 4, device="meta")
    with pytest.raises(BackendUnavailable, match=f"x: got device meta, wants .*{backend}"):
        echo_lora_linear(x, x, None, x[:2], x[:, :2], 1.0, backend=backend)


def test_arguments_that_the_kernels_do_not_serve(backend):
    def with_gradient(case, name):
        getattr(case, name).requires_grad_()
        return case.call(backend)

    with pytest.raises(ValueError, match=rf"echo\.mask: requires a gradient.* on the {backend} backend"):
        with_gradient(make(backend, site="output", float_mask=True), "mask")
    with pytest.raises(ValueError, match=f"weight: requires a gradient.* on the {backend} backend"):
        with_gradient(make(backend, dora=True, p=0.1), "weight")
    with pytest.raises(TypeError, match="x: got dtype"):
        case = make(backend, dtype=torch.float32)
        echo_lora_linear(case.x.half(), case.weight, None, case.lora_a, case.lora_b, 1.0, backend=backend)


def test_ranks_up_to_the_largest(backend):
    most = load(backend).max_rank
    case = make(backend, r=most, site="rank")
    assert_equal_up_to_rounding(case.results(backend), case.results("reference"))
    with pytest.raises(ValueError, match=f"lora_a: got rank {most + 1}, wants at most {most} on the {backend}"):
        make(backend, r=most + 1).call(backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_computes_in_its_dtype(backend, device, dtype):
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    case = make(backend, dtype=torch.float32)
    with torch.autocast(device.type, dtype):
        y = case.call(backend)
    assert y.dtype == dtype
    want = case.call("reference")
    assert (y - want).abs().max() < 8 * torch.finfo(dtype).eps * want.abs().max()


def test_autocast_does_not_narrow_float64(backend, device):
    case = make(backend, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match=r"^x: got dtype torch.float64"):
        replace(case, x=case.x.double()).call(backend)
