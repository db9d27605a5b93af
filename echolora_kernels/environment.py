"""The environment variables that matter, in one place; docs/environment.md shows the same table."""

from __future__ import annotations

import os
from typing import NamedTuple


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
        "cannot compute a layer is an error",
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
