"""The echo networks' launches."""

import pytest
import torch
from network_cases import make

from echolora_kernels.ops.echo_lora_linear import launch
from echolora_kernels.ops.echo_networks import triton_launch


@pytest.mark.parametrize("count", [1, 28])
def test_two_launches_forward_and_two_backward(monkeypatch, count):
    names = []

    def record(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch.run(kernel, *arguments, **options)

    monkeypatch.setattr(triton_launch, "run", record)
    case = make("triton", widths=(4,) * count)
    leaves = [tensor.requires_grad_() for tensor in case.tensors().values()]
    deltas = case.call("triton")
    forward = ["networks_down_fwd_kernel", "networks_up_fwd_kernel"]
    assert names == forward
    torch.autograd.grad(deltas, leaves, case.ddelta)
    assert names == [*forward, "networks_up_bwd_kernel", "networks_sum_bwd_kernel"]
