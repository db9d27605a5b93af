"""Which implementation of an operator runs: probing, choosing, and saying why not.

`functional` calls `choose(op, requested, device)`; a backend is a module path per operator plus a probe. An explicit
name insists (BackendUnavailable otherwise); None takes the environment variable ECHOLORA_BACKEND, else the first
backend that is available, has the operator, and is meant for tensors on that device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import BackendUnavailable

ENVIRONMENT_VARIABLE = "ECHOLORA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One family of implementations.

    Args:
        name: what a caller passes as `backend=`.
        operators: operator name -> "module:function" below this package.
        why_unavailable: probe; None when the backend can run here, else the reason.
        preferred_on: device types on which it is chosen without being named; None for all.
    """

    name: str
    operators: dict[str, str]
    why_unavailable: Callable[[], str | None]
    preferred_on: tuple[str, ...] | None = None


def _always_available() -> str | None:
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _why_no_triton() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a stray folder called triton is found without an origin
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no GPU, and TRITON_INTERPRET=1 is not set"
    return None


# In order of preference; the reference is last because it always works.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="triton",
        operators={
            "echo_lora_linear": "ops.echo_lora_linear.autograd:echo_lora_linear",
            "echo_lora_linear_group": "ops.echo_lora_linear.triton_group:echo_lora_linear_group",
        },
        why_unavailable=_why_no_triton,
        preferred_on=("cuda",),
    ),
    Backend(
        name="reference",
        operators={
            "echo_lora_linear": "ops.echo_lora_linear.reference:echo_lora_linear",
            "echo_lora_linear_group": "ops.echo_lora_linear.reference:echo_lora_linear_group",
            "echo_network": "ops.echo_network.reference:echo_network",
            "echo_distillation": "ops.echo_distillation.reference:echo_distillation",
        },
        why_unavailable=_always_available,
    ),
)


def choose(op: str, requested: str | None = None, device: torch.device | None = None) -> Callable:
    """The implementation of `op` to call.

    Args:
        op: operator name, for instance "echo_lora_linear".
        requested: backend name that must be honoured, or None to choose.
        device: where the arguments are; None leaves out the backends that are meant for particular devices.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the named backend cannot run here or lacks the operator.
    """
    requested = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if requested is not None:
        backend = _by_name(requested)
        reason = backend.why_unavailable() or _why_lacking(backend, op)
        if reason:
            raise BackendUnavailable(f"backend {requested!r} cannot run {op}: {reason}")
        return _load(backend, op)
    for backend in BACKENDS:
        if op in backend.operators and _preferred(backend, device) and backend.why_unavailable() is None:
            return _load(backend, op)
    raise BackendUnavailable(f"no backend can run {op}: {availability()}")


def availability() -> dict[str, str]:
    """Backend name -> "available", or the reason why it is not."""
    return {backend.name: backend.why_unavailable() or "available" for backend in BACKENDS}


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(repr(backend.name) for backend in BACKENDS)
    raise ValueError(f"backend: got {name!r}, wants one of {known}")


def _preferred(backend: Backend, device: torch.device | None) -> bool:
    return backend.preferred_on is None or (device is not None and device.type in backend.preferred_on)


def _why_lacking(backend: Backend, op: str) -> str | None:
    return None if op in backend.operators else "it does not implement this operator"


def _load(backend: Backend, op: str) -> Callable:
    module, _, function = backend.operators[op].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)
