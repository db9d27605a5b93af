"""Every instruction set that this processor can run gives the numbers that the widest one does."""

import platform

import pytest
import torch
from native_cases import instruction_sets, passed, python

from echolora_kernels import native

pytestmark = pytest.mark.usefixtures("library")

NAMES = ("amx", "avx512", "avx2", "baseline")
TESTS = ("tests/backends/test_backend_kernels.py", "tests/backends/test_backend_linear.py")
# the kernels, and the layer where kinds of products, shapes and ranks differ
CHOSEN = "cpp and (backend_kernels or float64 or ranks or shapes or as_exact_as_torch or narrower_layer)"


@pytest.fixture(params=NAMES)
def instructions(request):
    if request.param not in instruction_sets():
        pytest.skip(f"this processor runs {', '.join(instruction_sets())}")
    return request.param


def test_the_list_begins_with_the_widest_and_ends_with_the_plain_one(monkeypatch):
    known = instruction_sets()
    assert known == [name for name in NAMES if name in known] and known[-1] == "baseline"
    code = "from echolora_kernels import native; native.why_unavailable(); print(native.cpu_instructions())"
    assert python(code, ECHOLORA_CPU_ISA=None).strip() == known[0]
    assert python(code, ECHOLORA_CPU_ISA="").strip() == known[0]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the plain kernels alone")
def test_what_the_processor_has_is_offered():
    """By what torch says about the processor, which asks it on its own."""
    known = instruction_sets()
    assert ("avx2" in known) >= torch.cpu._is_avx2_supported()
    assert ("avx512" in known) >= torch.cpu._is_avx512_supported()
    assert ("amx" in known) <= torch.cpu._is_amx_tile_supported()


def test_an_unknown_name_is_an_error_of_the_layer():
    code = """
import torch, echolora_kernels as e
x = torch.ones(2, 3)
try:
    e.functional.echo_lora_linear(x, x, None, x, torch.ones(2, 2), 1.0, backend="cpp")
except RuntimeError as error:
    print(error)
"""
    said = python(code, ECHOLORA_CPU_ISA="sse9").strip()
    assert said == f"ECHOLORA_CPU_ISA: got sse9, wants one of {', '.join(instruction_sets())}"


def test_the_kernels_are_right(instructions):
    if instructions == native.cpu_instructions():
        pytest.skip("the test-suite itself runs these")
    assert passed(*TESTS, "-k", CHOSEN, ECHOLORA_CPU_ISA=instructions) > 100


MASK = """
import hashlib, torch
from echolora_kernels import native
assert not native.why_unavailable()
operators = torch.ops.echolora
seen = hashlib.sha256(native.cpu_instructions().encode() if {label} else b"")
for width in (1, 5, 128, 301):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        drop = torch.tensor([2**61 + width]), 5033165, 1 / 0.7
        mask = operators.drop(torch.ones(3, 50, width, dtype=dtype), *drop) != 0
        # as it is replayed inside a product
        eye = torch.eye(min(width, 256), width, dtype=dtype)
        inside = operators.shrink(torch.ones(3, 50, width, dtype=dtype), eye, 1.0, *drop, None, 0, None, None) != 0
        assert torch.equal(inside, mask[:, :256])
        assert 0.6 < mask.double().mean() < 0.8 or width == 1
        seen.update(bytes(mask.flatten().tolist()))
print(seen.hexdigest())
"""


def test_the_dropout_mask_is_the_same():
    names = instruction_sets()
    assert len({python(MASK.format(label=False), ECHOLORA_CPU_ISA=name) for name in names}) == 1
    assert len({python(MASK.format(label=True), ECHOLORA_CPU_ISA=name) for name in names}) == len(names)
