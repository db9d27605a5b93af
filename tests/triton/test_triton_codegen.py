"""Compile-only: every config that can be picked, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.codegen

SCRIPT = Path(__file__).with_name("codegen.py")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("bfloat16", "float16", "float32")
# fewer than wgmma's 64 rows
FEW_ROWS = ("lora_a_bwd_kernel", "shrink_fwd_kernel", "small_adapter_bwd_kernel")
WITHOUT_PRODUCTS = (
    "dora_gain_fwd_kernel",
    "scale_rows_kernel",
    "distillation_fwd_kernel",
    "distillation_bwd_kernel",
)
# these sum over a rank, a bottleneck or the samples of a batch
SHORT_SUMS = ("dora_squares_fwd_kernel", "networks_up_fwd_kernel", "networks_up_bwd_kernel")


def compiled(arch, dtype, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--arch", arch, "--dtype", dtype, *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_sound(results):
    assert results
    for result in results:
        assert "error" not in result, result
        assert result["shared"] <= result["limit"], result
        if result["dtype"] == "float32" and result["kernel"] not in SHORT_SUMS:
            assert result["chained"] == 0, f"one chain of FMAs over all blocks: {result}"
        if result["arch"].startswith("gfx"):
            continue
        assert result["LDL"] == result["STL"] == 0, f"spills: {result}"
        if result["kernel"].startswith("networks"):  # a few samples, mostly in float32: memory is what they wait for
            continue
        multiplies = result["dtype"] != "float32" and result["kernel"] not in WITHOUT_PRODUCTS
        if result["arch"] == "sm_90" and multiplies:
            older = result["HMMA"] if result["kernel"] in FEW_ROWS else 0
            assert result["HGMMA"] + older > 0, f"no Hopper matrix instructions: {result}"
        if "descriptor" in result["kernel"]:
            assert result["UTMALDG"] > 0 and result["UTMASTG"] > 0, f"no TMA: {result}"
            assert result["HGMMA"] + result["UTCHMMA"] > 0, f"no matrix instructions: {result}"
        if result["arch"] == "sm_80" and multiplies:
            assert result["HMMA"] > 0, f"no matrix instructions: {result}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_configs_compile_and_fit(arch, dtype):
    assert_sound(compiled(arch, dtype))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_compiles_and_fits(arch, dtype):
    assert_sound(compiled(arch, dtype, "--all"))


def test_nothing_is_compiled_for_what_divides_a_length():
    """No argument that changes with the lengths in a batch is specialised."""
    code = """
import importlib, pkgutil, triton, echolora_kernels.ops as ops
from echolora_kernels.ops.echo_lora_linear.triton_blocks import VARYING
for module in pkgutil.walk_packages(ops.__path__, ops.__name__ + "."):
    if "triton" not in module.name:
        continue
    for name, kernel in vars(importlib.import_module(module.name)).items():
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel") and "T" in kernel.arg_names:
            print(name, *(p.name for p in kernel.params if p.name in VARYING and not p.do_not_specialize))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = [line.split() for line in run.stdout.splitlines()]
    assert len(found) >= 12 and all(len(words) == 1 for words in found), found
