"""Without the library the package works, says why it goes without, and gives the reference's numbers."""

import pytest
from native_cases import ROOT, passed, python

from echolora_kernels import native

LAYER = """
import torch, echolora_kernels as e
from echolora_kernels import backends, functional, native

torch.manual_seed(0)
x, weight, a, b = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
echo = e.Echo(torch.randn(2, 6), torch.rand(2, 5) < 0.5)
leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

def results(backend):
    torch.manual_seed(1)
    y = functional.echo_lora_linear(
        x, weight, None, a, b, 0.7, dropout_p=0.3, magnitude=torch.ones(6), echo=echo, backend=backend
    )
    return [y, *torch.autograd.grad(y.sum(), leaves)]

chosen = results(None)
assert all(torch.equal(got, want) for got, want in zip(chosen, results("reference"), strict=True))
said = backends.availability()
assert said["reference"] == "available"
try:
    results("cpp")
except e.BackendUnavailable as error:
    assert said["cpp"] in str(error), error
else:
    raise AssertionError("the cpp backend ran")
layer = e.EchoLoRALinear(8, 6, r=3)
assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
print(said["cpp"])
"""


@pytest.fixture
def other_files(tmp_path):
    """Paths that are no library."""
    text, empty, other = (tmp_path / name for name in ("text.so", "empty.so", "folder.so"))
    text.write_text("no library")
    empty.touch()
    other.mkdir()
    return {"text": text, "empty": empty, "folder": other, "missing": tmp_path / "missing.so"}


def test_none_goes_without():
    assert python(LAYER, ECHOLORA_LIBRARY="none").strip() == (
        "ECHOLORA_LIBRARY=none says to go without the compiled library"
    )


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_path_without_a_file(kind, other_files):
    said = python(LAYER, ECHOLORA_LIBRARY=str(other_files[kind]))
    assert f"there is no compiled library at {other_files[kind]}" in said


@pytest.mark.parametrize("kind", ["text", "empty"])
def test_a_file_that_is_no_library(kind, other_files):
    said = python(LAYER, ECHOLORA_LIBRARY=str(other_files[kind]))
    assert "the compiled library cannot be loaded: " in said and str(other_files[kind]) in said


def test_the_same_program_with_the_library(library):
    """So that the checks above are about the library's absence."""
    code = LAYER.replace('raise AssertionError("the cpp backend ran")', "pass")
    code = code.split("chosen = results")[0] + "print(backends.availability()['cpp'], *results('cpp')[0].shape)"
    assert python(code, ECHOLORA_LIBRARY=str(native.path())).split() == ["available", "2", "5", "6"]


def test_the_variable_is_read_by_name_alone(monkeypatch):
    monkeypatch.delenv("ECHOLORA_LIBRARY", raising=False)
    assert native.path() == ROOT / "echolora_kernels" / native.FILE_NAME
    monkeypatch.setenv("ECHOLORA_LIBRARY", "")
    assert native.path() == ROOT / "echolora_kernels" / native.FILE_NAME
    monkeypatch.setenv("ECHOLORA_LIBRARY", "none")
    assert native.path() is None


def test_the_suite_passes_without_it():
    tests = ("tests/layers", "tests/ops", "tests/test_backends.py")
    assert passed(*tests, "-k", "not triton", ECHOLORA_LIBRARY="none") > 100


def test_the_library_needs_no_more_than_its_file(library, tmp_path):
    """It can lie anywhere."""
    copy = tmp_path / "elsewhere.so"
    copy.write_bytes(native.path().read_bytes())
    code = "from echolora_kernels import native; print(native.why_unavailable())"
    assert python(code, ECHOLORA_LIBRARY=str(copy)).strip() == "None"
