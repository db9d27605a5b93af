"""A small PEFT model to fuse, and what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import gradients
from torch import nn

from echolora_kernels import unfuse

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
lora_or_dora = pytest.mark.parametrize("kind", ["lora", "dora"])
narrow_dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, None, False),
        (torch.bfloat16, None, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=["float32", "bfloat16", "float32 on bfloat16", "the same under autocast"],
)


class Net(nn.Module):
    """Two adapted linears, and a head for modules_to_save."""

    def __init__(self, d_in=12, d_out=9, bias=True):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(d_in, d_out, bias), nn.Linear(d_out, d_in), nn.Linear(d_in, 5)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def config(kind="lora", r=4, dropout=0.0, **options):
    return LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["first", "second"], **KINDS[kind], **options
    )


def net(kind="lora", dtype=torch.float64, adapter_dtype=None, sizes=(12, 9), bias=True, **options):
    """A PeftModel of `Net` in training mode whose adapter does something."""
    model = get_peft_model(Net(*sizes, bias), config(kind, **options)).to(dtype)  # PiSSA decomposes in float32 at most
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter_dtype is not None:
            parameter.data = parameter.data.to(adapter_dtype)
    return moved(model).train()


def moved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def results(model, x, **arguments):
    """y and the gradients of x and of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    y = model(x, **arguments)
    if y.requires_grad:
        torch.manual_seed(4)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), **({} if x.grad is None else {"x": x.grad}), **gradients(model)}


def assert_same(got, wanted, tolerance=1e-12):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def unfused(model):
    model = copy.deepcopy(model)
    unfuse(model)
    return model
