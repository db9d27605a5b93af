"""Every instruction set that this processor can run gives the numbers that the widest one does."""

import platform

import pytest
import torch
from native_cases import instruction_sets, passed, python

from echolora_kernels import native

pytestmark = pytest.mark.usefixtures("library")

NAMES = ("amx", "avx512", "avx2", "baseline")
TESTS = (
    *(f"tests/backends/test_backend_{name}.py" for name in ("kernels", "linear", "networks")),
    "tests/losses/test_loss_rows.py",
)
# the kernels, and the layer and the echo networks where kinds of products, shapes and ranks differ
CHOSEN = (
    "cpp and (backend_kernels or loss_rows or float64 or ranks or shapes or narrower_layer or autocast or exact or grid "
    "or values)"
)


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
print(e.backends.availability()["cpp"])
for backend in ("cpp", None):
    try:
        e.functional.echo_lora_linear(x, x, None, x, torch.ones(2, 2), 1.0, backend=backend)
    except RuntimeError as error:
        print(error)
"""
    said = python(code, ECHOLORA_CPU_ISA="sse9").splitlines()
    assert said == [f"ECHOLORA_CPU_ISA: got sse9, wants one of {', '.join(instruction_sets())}"] * 3


def test_the_kernels_are_right(instructions):
    if instructions == native.cpu_instructions():
        pytest.skip("the test-suite itself runs these")
    assert passed(*TESTS, "-k", CHOSEN, ECHOLORA_CPU_ISA=instructions) > 100


EXACTNESS = """
import sys
sys.path.insert(0, "tests")
import torch
from linear_cases import error_ratios, make

torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    for site, dora in ((None, False), ("rank", True), ("adapter_input", False), ("output", True)):
        ratios = {{}}
        for seed in range({draws}):
            torch.manual_seed(seed)
            case = make("cpp", 2, 93, 150, 141, 12, site=site, dora=dora, dtype=dtype)
            exact = case.to(torch.float64).results("reference")
            for name, pair in error_ratios(case.results("cpp"), case.results("reference"), exact).items():
                ratios.setdefault(name, []).append(pair)
        for name, pairs in ratios.items():
            print(dtype, site, name, *(sum(each) / {draws} for each in zip(*pairs)))
"""


def test_as_exact_as_torch_on_average(instructions):
    """The mean over ten draws: the largest error of a gradient of 24 elements is a matter of luck in a single one."""
    lines = python(EXACTNESS.format(draws=10), ECHOLORA_CPU_ISA=instructions).splitlines()
    assert len(lines) == 2 * (5 + 7 + 6 + 7)
    for line in lines:
        *_, largest, rms = line.split()
        assert float(largest) <= 1.3 and float(rms) <= 1.15, line


MASK = """
import hashlib, torch
from echolora_kernels import native
assert not native.why_unavailable()
operators = torch.ops.echolora
seen = hashlib.sha256()
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
print(native.cpu_instructions(), seen.hexdigest())
"""


def test_the_dropout_mask_is_the_same():
    found = dict(python(MASK, ECHOLORA_CPU_ISA=name).split() for name in instruction_sets())
    assert list(found) == instruction_sets() and len(set(found.values())) == 1
