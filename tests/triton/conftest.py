"""The kernels run for real where there is a GPU, and in Triton's interpreter where there is none."""

import pytest
import torch
from triton_cases import DEVICE

from echolora_kernels.backends import BACKENDS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def forget():
    """Call it to have everything planned and chosen anew."""
    return _forget


@pytest.fixture(autouse=True)
def _products_apart(monkeypatch):
    """On GPUs too, where most cases here are small enough for kernels of their own: `small` brings those."""
    from echolora_kernels.ops.echo_lora_linear import triton_kernels

    monkeypatch.setattr(triton_kernels, "small", lambda *_: False)


@pytest.fixture(params=[True, False], ids=["one launch", "few launches"])
def small(_products_apart, monkeypatch, request):
    """Every LoRA layer without an echo is small; whether so small that one launch is enough."""
    from echolora_kernels.ops.echo_lora_linear import triton_kernels, triton_small_launch

    monkeypatch.setattr(triton_kernels, "small", lambda *_: True)
    monkeypatch.setattr(triton_small_launch, "_in_one", lambda *_: request.param)
    return request.param


@pytest.fixture(autouse=True)
def _planned_anew():
    _forget()
    yield
    _forget()


def _forget():
    from echolora_kernels.ops.dora_norm import triton_norm
    from echolora_kernels.ops.echo_lora_linear import (
        triton_backward_launch,
        triton_descriptors,
        triton_forward_launch,
        triton_products,
        triton_scale,
        triton_small_launch,
    )

    modules = (
        triton_norm,
        triton_forward_launch,
        triton_backward_launch,
        triton_descriptors,
        triton_products,
        triton_scale,
        triton_small_launch,
    )
    for module in modules:
        for function in vars(module).values():
            getattr(function, "cache_clear", lambda: None)()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    from echolora_kernels.ops.echo_lora_linear.launch import Launch

    names, run = [], Launch.run

    def record(planned, device, **tensors):
        names.append(planned.kernel.fn.__name__)
        run(planned, device, **tensors)

    monkeypatch.setattr(Launch, "run", record)
    return names


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "codegen: compiles kernels and runs none, so it needs neither GPU nor interpreter"
    )
    config.addinivalue_line("markers", "gpu: needs a GPU")


def pytest_collection_modifyitems(config, items):
    reason = next(backend for backend in BACKENDS if backend.name == "triton").why_unavailable()
    for item in items:
        if "triton" not in item.path.parts:
            continue
        if reason and "codegen" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"triton on {DEVICE}: {reason}"))
