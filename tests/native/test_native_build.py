"""Building and installing: what a wheel holds, what is compiled when, and that a failing build is told."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_cases import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler on Linux"
)
NOT_IN_A_CHECKOUT = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "dist", "*.egg-info")
# what the tests around this one may have set
PLAIN = dict.fromkeys(
    ("CXX", "ECHOLORA_BUILD", "ECHOLORA_LIBRARY", "ECHOLORA_SANITIZE", "ECHOLORA_BACKEND", "TRITON_INTERPRET")
) | {"ECHOLORA_CUDA_ARCHS": "none"}

LAYER = """
import torch, echolora_kernels as e
from echolora_kernels import backends, native
print(e.__file__)
print(native.path().is_file())
print(backends.availability()["cpp"])
x, w, a, b = torch.randn(4, 5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
reference = e.functional.echo_lora_linear(x, w, None, a, b, 0.7, backend="reference")
for backend in {backends}:
    y = e.functional.echo_lora_linear(x, w, None, a, b, 0.7, backend=backend)
    torch.testing.assert_close(y, reference)
print("right")
"""


def not_in_a_checkout(folder, names):
    """What `.gitignore` leaves out; "runs" is left out at the top alone, where the demo writes."""
    return NOT_IN_A_CHECKOUT(folder, names) | ({"runs"} if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of a copy of this checkout with nothing built."""
    copy = tmp_path_factory.mktemp("checkout") / "echolora_kernels"
    shutil.copytree(ROOT, copy, ignore=not_in_a_checkout)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=copy, check=True, stdout=subprocess.DEVNULL, env=environment(**PLAIN)
    )
    (made,) = (copy / "dist").iterdir()
    return made


@pytest.fixture
def tree(sdist, tmp_path):
    """What is in the source distribution."""
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.10.12, 3.11.4 and newer
        archive.extractall(tmp_path, **safe)
    return (tmp_path / sdist.name.removesuffix(".tar.gz")).rename(tmp_path / "tree")


def build(tree, *, ends_well=True, **changes):
    """`pip wheel`, as a user would: the wheel, if there is one, and everything that was said."""
    out = tree.parent / f"wheels-{len(list(tree.parent.iterdir()))}"
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", str(out), "."]
    done = subprocess.run(
        command, cwd=tree, env=environment(**(PLAIN | {"PYTHONPATH": None} | changes)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=800,
    )  # fmt: skip
    assert (done.returncode == 0) == ends_well, done.stdout[-4000:]
    return next(out.glob("*.whl"), None), done.stdout


def libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith((".so", ".o"))]


def use(wheel, folder, backends):
    """The lines that a program prints which has this wheel installed and this checkout nowhere."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, env=environment(**PLAIN), cwd=folder.parent)
    done = subprocess.run(
        [sys.executable, "-c", LAYER.format(backends=backends)], cwd=folder.parent, text=True, capture_output=True,
        env=environment(**PLAIN | {"PYTHONPATH": str(folder)}), timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, *said = done.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return said


def objects(tree):
    return {path.name: path.stat().st_mtime_ns for path in (tree / "build" / "csrc").glob("*.o")}


def assert_without_library(wheel, folder):
    assert wheel.name.endswith("-py3-none-any.whl") and not libraries(wheel)
    found, why, right = use(wheel, folder, ("reference", None))
    assert (found, right) == ("False", "right") and why.startswith("there is no compiled library at")


def test_the_source_distribution_has_all_that_is_kept(tree):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, text=True, capture_output=True).stdout.split()
    kept = {name for name in listed if not name.startswith(".")}
    made = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert kept <= made
    assert not {name for name in made - kept if not name.startswith("echolora_kernels.egg-info/")} - {
        "PKG-INFO", "setup.cfg"
    }  # fmt: skip


@needs_compiler
def test_a_wheel_with_the_library(tree, tmp_path):
    """One test of several steps, since each of them needs the half minute that the compiler takes."""
    wheel, _ = build(tree, ECHOLORA_BUILD="require")
    platform = wheel.name.removesuffix(".whl").split("-py3-none-")[1]
    assert platform.startswith(("linux_", "manylinux"))
    assert libraries(wheel) == ["echolora_kernels/_native.so"]
    assert use(wheel, tmp_path / "installed", ("cpp", "reference", None)) == ["True", "available", "right"]

    before = objects(tree)
    assert {"library.o", "bind_linear.o", "dispatch.o", "baseline.o"} <= before.keys()
    if shutil.which("ninja"):
        again, _ = build(tree, ECHOLORA_BUILD="require")
        assert objects(tree) == before and libraries(again) == libraries(wheel)
        assert to_be_compiled(tree) == set()
        (tree / "csrc" / "check.h").touch()  # of the bindings alone
        assert "bind_linear.o" in to_be_compiled(tree) and "baseline.o" not in to_be_compiled(tree)
        (tree / "csrc" / "cpu" / "types.h").touch()
        assert to_be_compiled(tree) == before.keys()


def to_be_compiled(tree):
    """The object files that ninja would make anew."""
    said = subprocess.run(
        ["ninja", "-n", "-v", "-C", str(tree / "build" / "csrc")], check=True, text=True, capture_output=True
    ).stdout
    return {Path(line.split(" -o ")[1].split()[0]).name for line in said.splitlines() if " -c " in line}


def test_none_says_so_and_makes_a_wheel_for_any_platform(tree, tmp_path):
    wheel, said = build(tree, ECHOLORA_BUILD="none")
    assert "going without the compiled library: ECHOLORA_BUILD=none says so" in said
    assert not (tree / "build" / "csrc").exists()
    assert_without_library(wheel, tmp_path / "installed")


@needs_compiler
def test_a_compiler_that_fails_is_told(tree, tmp_path):
    wheel, said = build(tree, CXX="/bin/false")
    assert "going without the compiled library: a compiler failed, see its message above (exit status 1)" in said
    assert_without_library(wheel, tmp_path / "installed")
    wheel, said = build(tree, CXX="/bin/false", ECHOLORA_BUILD="require", ends_well=False)
    assert wheel is None
    assert "the compiled library could not be built: a compiler failed, see its message above" in said


@pytest.mark.parametrize("ninja", [True, False])
def test_a_compiler_that_is_not_there_is_told(tree, tmp_path, ninja):
    if ninja and not shutil.which("ninja"):
        pytest.skip("no ninja")
    wheel, said = build(tree, CXX="/no/such/compiler", PATH=os.environ["PATH"] if ninja else str(tmp_path))
    assert "going without the compiled library: " in said
    assert_without_library(wheel, tmp_path / "installed")


def test_none_leaves_out_what_an_earlier_build_has_left(tree):
    build(tree, ECHOLORA_BUILD="none")
    (folder,) = (tree / "build").glob("lib*/echolora_kernels")
    (folder / "_native.so").touch()
    wheel, _ = build(tree, ECHOLORA_BUILD="none")
    assert libraries(wheel) == [] and wheel.name.endswith("-py3-none-any.whl")


def test_gpu_architectures_without_nvcc_are_told(tree):
    without = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    for asked in ("90", "80;90a"):
        changes = {"PATH": os.pathsep.join(without), "ECHOLORA_CUDA_ARCHS": asked}
        wheel, said = build(tree, **changes)
        message = f"ECHOLORA_CUDA_ARCHS={asked} asks for CUDA kernels, but there is no nvcc on the PATH"
        assert f"going without the compiled library: {message}" in said
        assert wheel.name.endswith("-py3-none-any.whl")
    _, said = build(tree, ECHOLORA_BUILD="require", ends_well=False, **changes)
    assert f"the compiled library could not be built: {message}" in said
