"""The CUDA half without a GPU: it compiles, keeps its registers, uses the matrix units, and loads where there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_cases import ROOT, environment, python, run

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc on the PATH"),
]

ARCHITECTURES = ("80", "90")
# the products; elementwise kernels have nothing to multiply
PRODUCTS = ("shrink_kernel", "expand_kernel", "contract_rows_kernel")
HALF = {"6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def build(tree, folder, nvcc):
    """The library in `folder` of the tree, with the nvcc of another folder first on the PATH."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder],
        cwd=tree, text=True, capture_output=True, timeout=1500,
        env=environment(
            ECHOLORA_CUDA_ARCHS=";".join(ARCHITECTURES), ECHOLORA_BUILD="require", CXX=None, ECHOLORA_SANITIZE=None,
            PATH=f"{nvcc}{os.pathsep}{os.environ['PATH']}",
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return tree / folder / "echolora_kernels" / "_native.so"


@pytest.fixture(scope="module")
def toolkit():
    """The folder of nvcc itself, where that on the PATH may be a script that starts it."""
    said = subprocess.run(["nvcc", "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE).group(1)).resolve() / "bin"


@pytest.fixture(scope="module")
def library(tmp_path_factory, toolkit):
    """A library with both halves, built from a copy of the sources."""
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    tree.mkdir()
    for name in ("csrc", "echolora_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return build(tree, "out", toolkit)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, library, tmp_path_factory):
    """Name -> SASS of every kernel for one architecture."""
    triton = pytest.importorskip("triton", reason="Triton brings cuobjdump and nvdisasm")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    subprocess.run([binaries / "cuobjdump", "-xelf", f"sm_{request.param}", library], cwd=folder, check=True)
    found = {}
    for cubin in folder.glob("*.cubin"):
        sass = subprocess.run([binaries / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
        for section in re.split(r"^\s*\.section\s+", sass, flags=re.MULTILINE):
            if section.startswith(".text."):
                name, body = section.split(",", 1)
                assert re.search(r"\bEXIT\b", body), f"{name} was cut short"
                found[name] = body
    assert all(any(product in name for name in found) for product in PRODUCTS), found.keys()
    return found


def test_no_kernel_spills(kernels):
    spilling = [name for name, body in kernels.items() if re.search(r"\b(STL|LDL)\b", body)]
    assert not spilling


@pytest.mark.parametrize("kind", HALF, ids=HALF.get)
@pytest.mark.parametrize("product", PRODUCTS)
def test_half_precision_products_are_computed_by_the_matrix_units(kernels, product, kind):
    # all but the norm of such a weight with float32 adapters, which is computed in float32
    wide = f"{kind}fE"
    chosen = {name: body for name, body in kernels.items() if product in name and kind in name and wide not in name}
    assert chosen
    without = [name for name, body in chosen.items() if not re.search(r"\bHMMA\b", body)]
    assert not without


def test_the_library_loads_without_a_gpu(library):
    code = """
import torch
from echolora_kernels import backends, native
assert native.why_unavailable() is None, native.why_unavailable()
print(*native.cuda_architectures())
print(backends.availability()["cuda"])
"""
    built, said = python(code, ECHOLORA_LIBRARY=str(library), CUDA_VISIBLE_DEVICES="").splitlines()
    assert built.split() == [f"sm_{name}" for name in ARCHITECTURES]
    assert said == "there is no GPU"


def test_an_nvcc_that_is_a_script_around_another_serves_too(library, toolkit, tmp_path):
    """As package managers install it; only the linking differs, the objects are there."""
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit / "nvcc"} "$@"\n')
    script.chmod(0o755)
    assert build(library.parents[2], "again", tmp_path).is_file()


def test_the_cpu_half_is_the_same(library):
    done = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_backend_kernels.py",
         "-k", "cpp"], ECHOLORA_LIBRARY=str(library), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_a_machine_without_a_gpu_gets_no_cuda_half(tmp_path):
    """What setup.py decides where nothing is asked for."""
    code = """
import sys, types
setuptools = __import__("setuptools")
setuptools.setup = lambda **options: None
import setup, torch
torch.cuda.is_available = lambda: False
print(setup.cuda_architectures(torch))
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 3
torch.cuda.get_device_capability = lambda index: [(9, 0), (7, 5), (8, 0)][index]
print(setup.cuda_architectures(torch))
"""
    assert python(code, ECHOLORA_CUDA_ARCHS=None).splitlines() == ["[]", "['80', '90']"]
