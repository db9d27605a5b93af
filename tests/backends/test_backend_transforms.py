"""Calls from inside torch.func transforms, fake tensors and symbolic sizes."""

import pytest
import torch
from linear_cases import make
from torch._subclasses import FakeTensorMode

from echolora_kernels import EchoLoRALinear
from echolora_kernels.functional import echo_lora_linear, echo_lora_linear_group
from echolora_kernels.ops.echo_lora_linear import Projection


def test_transforms_take_the_reference_by_themselves():
    """vmap and functional gradients have no rules for kernels; what is chosen automatically has."""
    layer, x = EchoLoRALinear(16, 24, r=3), torch.randn(5, 16)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: E731
    found = torch.func.grad(loss)(parameters)
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found["lora_B"], layer.lora_B.grad)


def test_forward_mode_gradients_are_refused(backend):
    case = make(backend)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(case.x, torch.ones_like(case.x))
        with pytest.raises(Exception, match=r"jvp|forward"):
            echo_lora_linear(dual, case.weight, None, case.lora_a, case.lora_b, 1.0, backend=backend)


def test_fake_tensors(backend):
    case = make(backend)
    with FakeTensorMode() as mode:
        x, w, a, b = (mode.from_tensor(t) for t in (case.x, case.weight, case.lora_a, case.lora_b))
        y = echo_lora_linear(x, w, None, a, b, 1.0, backend=backend)
    assert y.shape == (*case.x.shape[:-1], len(case.weight)) and y.dtype == case.x.dtype


def test_fake_tensors_in_a_group(backend):
    case = make(backend)
    with FakeTensorMode() as mode:
        x, w, a, b = (mode.from_tensor(t) for t in (case.x, case.weight, case.lora_a, case.lora_b))
        a.requires_grad_()
        ys = echo_lora_linear_group(x, [Projection(w, None, a, b, 1.0)] * 2, backend=backend)
        sum(y.sum() for y in ys).backward()
    assert [y.shape for y in ys] == [(*case.x.shape[:-1], len(case.weight))] * 2 and a.grad.shape == a.shape
