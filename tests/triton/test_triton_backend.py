"""Which backend is chosen, what it says when it cannot run, and what importing the package does not import."""

import subprocess
import sys

import pytest
import torch
from triton_cases import DEVICE, make

from echolora_kernels import backends
from echolora_kernels.errors import BackendUnavailable
from echolora_kernels.functional import echo_lora_linear
from echolora_kernels.ops.echo_lora_linear import reference


def in_a_new_process(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_chosen_for_gpu_tensors_only(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    chosen = lambda device: backends.choose("echo_lora_linear", None, device)  # noqa: E731
    assert chosen(torch.device("cuda")).keywords == {"backend": "triton"}
    assert chosen(torch.device("cpu")) is chosen(None) is reference.echo_lora_linear
    assert backends.choose("echo_network", None, torch.device("cuda")).__module__.endswith("reference")


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


def test_other_devices_are_refused():
    x = torch.empty(3, 4, device="meta")
    with pytest.raises(BackendUnavailable, match="x: got device meta"):
        echo_lora_linear(x, x, None, x[:2], x[:, :2], 1.0, backend="triton")


def test_arguments_that_the_kernels_do_not_serve():
    def with_gradient(case, name):
        getattr(case, name).requires_grad_()
        return case.call("triton")

    with pytest.raises(ValueError, match="lora_a: got rank 257"):
        make(r=257).call("triton")
    with pytest.raises(ValueError, match=r"echo\.mask: requires a gradient"):
        with_gradient(make(site="output", float_mask=True), "mask")
    with pytest.raises(ValueError, match="weight: requires a gradient"):
        with_gradient(make(dora=True, p=0.1), "weight")
    with pytest.raises(TypeError, match="x: got dtype"):
        case = make(dtype=torch.float32)
        echo_lora_linear(case.x.half(), case.weight, None, case.lora_a, case.lora_b, 1.0, backend="triton")


def test_autocast_computes_in_its_dtype():
    case = make(dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.float16):
        y = case.call("triton")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), case.call("reference"), rtol=0.02, atol=0.1)
