"""Which backend is chosen, what it says when it cannot run, and what importing the package does not import."""

import subprocess
import sys

import pytest
import torch
from triton_cases import DEVICE, make

from echolora_kernels import backends
from echolora_kernels.errors import BackendUnavailable
from echolora_kernels.ops.echo_lora_linear import reference


def in_a_new_process(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_chosen_for_gpu_tensors_only(monkeypatch):
    rows = tuple(backend for backend in backends.BACKENDS if backend.name in ("triton", "reference"))
    monkeypatch.setattr(backends, "BACKENDS", rows)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    chosen = lambda device: backends.choose("echo_lora_linear", None, device)  # noqa: E731
    assert chosen(torch.device("cuda")).keywords == {"backend": "triton"}
    assert chosen(torch.device("cpu")) is chosen(None) is reference.echo_lora_linear
    for op in ("echo_networks", *backends.LOSSES):
        assert backends.choose(op, None, torch.device("cuda")).keywords == {"backend": "triton"}


def test_unavailable_without_gpu_and_interpreter():
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    code = "from echolora_kernels import backends; print(backends.availability()['triton'])"
    assert in_a_new_process(code, **environment).stdout.strip() == "there is no GPU, and TRITON_INTERPRET=1 is not set"


def test_importing_the_package_does_not_import_triton():
    import os

    code = (
        "import sys, echolora_kernels, echolora_kernels.backends as b; b.availability(); print('triton' in sys.modules)"
    )
    assert in_a_new_process(code, **os.environ).stdout.strip() == "False"


def test_bfloat16_is_refused_by_the_interpreter():
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match="bfloat16"):
        make(dtype=torch.bfloat16).call("triton")
    with pytest.raises(BackendUnavailable, match="bfloat16"), torch.autocast("cpu", torch.bfloat16):
        make(dtype=torch.float32).call("triton")
