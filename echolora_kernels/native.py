"""The compiled library: where it is, loading it once, and why it cannot be loaded.

One file, `_native.so` beside this one, whatever the Python version or torch build; setup.py builds it from csrc/.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

FILE_NAME = "_native.so"
LIBRARY_VARIABLE = "ECHOLORA_LIBRARY"


def path() -> Path | None:
    """The library's file: the one that ECHOLORA_LIBRARY names ("none" for no library), else the package's own."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named == "none":
        return None
    return Path(named) if named else Path(__file__).with_name(FILE_NAME)


@functools.cache
def why_unavailable() -> str | None:
    """None once the library is loaded, else the reason why it cannot be."""
    file = path()
    if file is None:
        return f"{LIBRARY_VARIABLE}=none says to go without the compiled library"
    if not file.is_file():
        return f"there is no compiled library at {file}: `pip install -v` says why it was not built"
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"the compiled library cannot be loaded: {error}"
    return None


@functools.cache
def why_no_instructions() -> str | None:
    """What is wrong with the instruction set that ECHOLORA_CPU_ISA names, which the library's first call raises."""
    try:
        cpu_instructions()
    except RuntimeError as error:
        return str(error)
    return None


def cpu_instructions() -> str:
    """The instruction set that the CPU kernels use: "amx", "avx512", "avx2" or "baseline"."""
    return torch.ops.echolora.cpu_instructions()


def cuda_architectures() -> tuple[str, ...]:
    """The GPU architectures that the library was built for, such as "sm_90"; none without nvcc."""
    return tuple(torch.ops.echolora.cuda_architectures().split())
