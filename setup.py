"""Builds the compiled library from csrc/; everything else about the package is in pyproject.toml.

ECHOLORA_CUDA_ARCHS   GPU architectures to build for, such as "80;90a"; "none" for no CUDA. Left out: those of the GPUs
                      in this machine, where torch sees any and nvcc is there.
ECHOLORA_BUILD=none   installs without the library. "require" makes a failing build fail the installation.
ECHOLORA_SANITIZE=1   adds the address and undefined-behaviour sanitizers to the CPU half.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI = "0x020b000000000000"  # of torch 2.11, the oldest that the package supports

COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# aligned, so that a loop's place in its cache lines, a tenth of the time, depends on nothing that stands before it
KERNELS = ["-ffp-contract=fast", "-fno-math-errno", "-falign-functions=64"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# csrc/cpu/isa.cpp is built once for each
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g"]


class CannotBuild(Exception):
    """Why the library is not built; the package runs without it."""


def instruction_sets() -> dict[str, list[str]]:
    """The instruction sets to build for, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return INSTRUCTION_SETS if x86 else {"baseline": []}


def cuda_architectures(torch) -> list[str]:
    """GPU architectures to build for, without "sm_": asked for, else those of the GPUs that are here."""
    asked = os.environ.get("ECHOLORA_CUDA_ARCHS")
    if asked == "none":
        return []
    if asked:
        if not shutil.which("nvcc"):
            raise CannotBuild(f"ECHOLORA_CUDA_ARCHS={asked} asks for CUDA kernels, but there is no nvcc on the PATH")
        return [name.strip().removeprefix("sm_") for name in asked.replace(",", ";").split(";") if name.strip()]
    if not torch.cuda.is_available() or not shutil.which("nvcc"):
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(f"{major}{minor}" for major, minor in found if (major, minor) >= (8, 0))


def cuda_toolkit() -> Path:
    """The folder of the toolkit that nvcc belongs to; nvcc itself may be a script somewhere else."""
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(found.group(1).strip() if found else Path(shutil.which("nvcc")).resolve().parent.parent)


class Rules:
    """What to compile how: a ninja file, or the same commands one by one where there is no ninja."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.edges = folder, []
        folder.mkdir(parents=True, exist_ok=True)

    def compile(self, command: list[str], source: Path, name: str) -> Path:
        """Adds one object file."""
        target = self.folder / f"{name}.o"
        makes_depfile = ["-MMD", "-MF", f"{target}.d"]
        self.edges.append((target, [source], [*command, *makes_depfile, "-c", str(source), "-o", str(target)], True))
        return target

    def link(self, command: list[str], objects: list[Path], target: Path, libraries: list[str]) -> None:
        """Adds the library."""
        self.edges.append((target, objects, [*command, *map(str, objects), "-o", str(target), *libraries], False))

    def run(self) -> None:
        """Builds everything that is out of date."""
        lines = ["ninja_required_version = 1.5", ""]
        for number, (target, inputs, command, has_depfile) in enumerate(self.edges):
            lines += [f"rule r{number}", f"  command = {shlex.join(command).replace('$', '$$')}"]
            lines += [f"  depfile = {_escaped(target)}.d", "  deps = gcc"] if has_depfile else []
            lines += [f"build {_escaped(target)}: r{number} {' '.join(map(_escaped, inputs))}", ""]
        (self.folder / "build.ninja").write_text("\n".join(lines))
        if shutil.which("ninja"):
            subprocess.run(["ninja", "-C", str(self.folder)], check=True)
            return
        for _, _, command, _ in self.edges:
            subprocess.run(command, check=True)


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def build_library(target: Path, folder: Path) -> None:
    """Compiles csrc/ into `target`, with object files in `folder`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or sys.platform != "linux":
        raise CannotBuild(f"it wants Linux and a C++ compiler; this is {sys.platform} with {compiler or 'none'}")
    try:
        import torch
    except ImportError as error:
        raise CannotBuild("torch is not there: install it first, and use --no-build-isolation") from error
    archs = cuda_architectures(torch)
    site = Path(torch.__file__).parent
    sanitizers = SANITIZERS if os.environ.get("ECHOLORA_SANITIZE") == "1" else []
    torch_flags = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(site / "include")]
    rules = Rules(folder)

    def compile_cpp(source: str, name: str, *flags: str) -> Path:
        return rules.compile([compiler, *COMMON, *flags, *sanitizers], CSRC / source, name)

    x86 = ["-DECHOLORA_X86"] if "amx" in instruction_sets() else []
    objects = [
        compile_cpp("library.cpp", "library", *torch_flags),
        *(compile_cpp(f"cpu/bind_{of}.cpp", f"bind_{of}", *torch_flags) for of in ("linear", "losses", "networks")),
        compile_cpp("cpu/dispatch.cpp", "dispatch", *x86),
    ]
    for name, flags in instruction_sets().items():
        objects.append(compile_cpp("cpu/isa.cpp", name, *KERNELS, *flags, f"-DECHOLORA_ISA={name}"))
    libraries = []
    if archs:
        names = " ".join(f"sm_{arch}" for arch in archs)
        objects.append(compile_cpp("cuda/bind.cpp", "cuda_bind", *torch_flags, f'-DECHOLORA_CUDA_ARCHS="{names}"'))
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        nvcc = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", compiler, *code]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            objects.append(rules.compile(nvcc, source, f"cuda_{source.stem}"))
        toolkit = cuda_toolkit()
        libraries = [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    target.parent.mkdir(parents=True, exist_ok=True)
    libraries += [f"-L{site / 'lib'}", "-ltorch_cpu", "-lc10"]  # in the process already when this one is loaded
    # a C++ library that is linked in stays our own: torch's has tables of the same names, and mixed they crash
    libraries.append("-Wl,--exclude-libs,ALL")
    rules.link([compiler, "-shared", *sanitizers], objects, target, libraries)
    rules.run()


class BuildLibrary(build_ext):
    """Builds the library with ninja; a package without it runs too, so a failure is told and not raised."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("ECHOLORA_BUILD", "")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # an earlier build's must not pass for this one's
        try:
            if wanted == "none":
                raise CannotBuild("ECHOLORA_BUILD=none says so")
            # a folder that stays, so that only what changed is compiled again
            objects = ROOT / "build" / ("csrc-sanitized" if os.environ.get("ECHOLORA_SANITIZE") == "1" else "csrc")
            build_library(target, objects)
        except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                reason = f"a compiler failed, see its message above (exit status {error.returncode})"
            if wanted == "require":
                raise SystemExit(f"echolora_kernels: the compiled library could not be built: {reason}") from error
            print(f"echolora_kernels: going without the compiled library: {reason}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """One file for every Python: nothing in it depends on the interpreter."""
        return fullname.replace(".", os.sep) + ".so"

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]

    def copy_extensions_to_source(self) -> None:
        """For editable installs: what was built, if anything was."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.is_file():
                self.copy_file(str(built), str(ROOT / self.get_ext_filename(ext.name)))


class PlatformWheel(bdist_wheel):
    """py3-none-any without the library; with it any Python of this platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_ext").get_outputs()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    ext_modules=[Extension("echolora_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
