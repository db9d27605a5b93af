"""What results depend on: versions, devices, and the environment variables that matter.

docs/environment.md shows the same table of variables.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import NamedTuple

import torch

from . import native
from .version import __version__


class Variable(NamedTuple):
    """What it does and what holds without it, as Markdown."""

    meaning: str
    default: str


VARIABLES = {
    "ECHOLORA_BACKEND": Variable(
        "backend to insist on, where the call names none, for the operators that it has", "automatic"
    ),
    "ECHOLORA_CANDIDATE": Variable(
        "how the Triton backend computes its large products: `fused`, or pairs such as "
        "`forward=accumulate,input-gradient=lora-first`, a product without one being left to the default; a way that "
        "cannot compute a layer is an error. Small layers have no kernels of their own then",
        "table, else rule",
    ),
    "ECHOLORA_TUNED": Variable(
        "folder with `DEVICE-NAME.json` tables of the fastest candidates, as `echolora tune` writes them",
        "the package's own",
    ),
    "ECHOLORA_CACHE": Variable("folder for models converted from GGUF", "`~/.cache/echolora`"),
    "TRITON_INTERPRET": Variable("Triton's own: `1` runs its kernels on CPU tensors, slowly, for tests", "off"),
    "ECHOLORA_LIBRARY": Variable("the compiled library's file; `none` goes without it", "the package's own"),
    "ECHOLORA_CPU_ISA": Variable(
        "the instruction set that the `cpp` backend uses: `amx`, `avx512`, `avx2` or `baseline`",
        "the widest that the processor has",
    ),
    "ECHOLORA_BUILD": Variable(
        "at installation: `none` builds no library, `require` makes a failing build fail the installation",
        "build, else go without",
    ),
    "ECHOLORA_CUDA_ARCHS": Variable(
        "at installation: GPU architectures to build for, such as `80;90a`; `none` for no CUDA",
        "those of the GPUs here, where nvcc is",
    ),
    "ECHOLORA_SANITIZE": Variable("at installation: `1` builds the library with sanitizers", "off"),
    "ECHOLORA_DEBUG": Variable("any value: the command line shows tracebacks, as with `--debug`", "off"),
}

# of others, which change how this package runs or what it finds
OTHERS = (
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "TRITON_CACHE_DIR",
    "WORLD_SIZE",
)


def variables_set() -> dict[str, str]:
    """Those of these that are set, and any ECHOLORA_ name that means nothing, which may be a slip of the pen."""
    found = {name: os.environ[name] for name in (*VARIABLES, *OTHERS) if name in os.environ}
    strange = sorted(name for name in os.environ if name.startswith("ECHOLORA_") and name not in VARIABLES)
    return found | {name: f"{os.environ[name]} (no such variable)" for name in strange}


PACKAGES = ("triton", "peft", "transformers", "trl", "accelerate", "bitsandbytes")


def installed(package: str) -> str:
    """Its version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def conditions(device: torch.device) -> dict[str, str]:
    """What measurements on `device` depend on, for a header of results."""
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        name = of.name
        hardware = f"sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        name = processor()
        instructions = "no compiled library" if native.why_unavailable() else native.cpu_instructions()
        hardware = f"{torch.get_num_threads()} threads, {instructions}"
    found = {"device": name, "hardware": hardware, "torch": torch.__version__, "echolora_kernels": __version__}
    found |= {"python": platform.python_version()}
    found |= {package: version for package in PACKAGES if (version := installed(package)) != "not installed"}
    return found | variables_set()
