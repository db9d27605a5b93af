"""The one place that says which backends these tests run against."""

import pytest
from linear_cases import device_for, why_not

from echolora_kernels.backends import BACKENDS
from echolora_kernels.ops.echo_lora_linear.kernels import load

KERNELS = (
    "dora_norm",
    "shrink",
    "linear_product",
    "adapter_backward",
    "lora_a_backward",
    "input_product",
    "group_input_product",
)


@pytest.fixture(scope="session", params=["triton", "cpp", "cuda"])
def backend(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _products_apart(request, monkeypatch):
    """Small layers have kernels of their own on GPUs: tests/triton/test_triton_small.py."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        monkeypatch.setattr(load("triton"), "small", lambda *_: False)


@pytest.fixture(scope="session", params=[backend.name for backend in BACKENDS if "echo_networks" in backend.operators])
def networks_backend(request):
    """Those that have the echo networks, the reference too."""
    if request.param != "reference" and (reason := why_not(request.param)):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def device(backend):
    return device_for(backend)


@pytest.fixture
def calls(backend, monkeypatch):
    """Names of the kernels that are called."""
    kernels, names = load(backend), []

    def recorded(name, function):
        def call(*arguments, **options):
            names.append(name)
            return function(*arguments, **options)

        return call

    for name in (*KERNELS, "linear_forward", "linear_backward") if kernels.fused else KERNELS:
        monkeypatch.setattr(kernels, name, recorded(name, getattr(kernels, name)))
    return names
