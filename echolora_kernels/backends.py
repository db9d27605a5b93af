"""Which implementation of an operator runs: probing, choosing, and saying why not.

`functional` calls `choose(op, requested, device)`; a backend is an import per operator plus a probe. An explicit
name insists (BackendUnavailable otherwise). None takes the environment variable ECHOLORA_BACKEND for the operators
that its backend has, else the first backend that is available, has the operator, and is meant for that device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import native
from .errors import BackendUnavailable

ENVIRONMENT_VARIABLE = "ECHOLORA_BACKEND"


def _no_reason() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One family of implementations.

    Args:
        name: what a caller passes as `backend=`.
        operators: operator name -> a function that imports the implementation and returns it.
        why_unavailable: probe; None when the backend can run here, else the reason.
        preferred_on: device types on which it is chosen without being named; None for all.
        why_misconfigured: what the environment asks of it in vain and its first call raises, if anything.
    """

    name: str
    operators: dict[str, Callable[[], Callable]]
    why_unavailable: Callable[[], str | None]
    preferred_on: tuple[str, ...] | None = None
    why_misconfigured: Callable[[], str | None] = _no_reason
    _imported: dict[str, Callable] = field(default_factory=dict, init=False, repr=False, compare=False)

    def implementation(self, op: str) -> Callable:
        """What runs `op`, imported when it is first asked for."""
        if op not in self._imported:
            self._imported[op] = self.operators[op]()
        return self._imported[op]


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


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if (reason := native.why_unavailable()) is not None:
        return reason
    built = native.cuda_architectures()
    if not built:
        return "the compiled library was built without CUDA kernels"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(_runs_on(arch, *capability) for arch in built):
            return f"the compiled library has kernels for {' '.join(built)}, not for sm_{capability[0]}{capability[1]}"
    return None


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch` runs there: the same major version, a minor one no larger; "sm_90a" on 9.0 alone."""
    number = arch.removeprefix("sm_")
    exact, digits = not number.isdigit(), number.rstrip("af")
    of = int(digits[:-1]), int(digits[-1])
    return of == (major, minor) if exact else of[0] == major and of[1] <= minor


def _echo_lora_linear_by(backend: str) -> Callable:
    from .ops.echo_lora_linear.autograd import echo_lora_linear

    return functools.partial(echo_lora_linear, backend=backend)


def _echo_lora_linear_group_by(backend: str) -> Callable:
    from .ops.echo_lora_linear.group import echo_lora_linear_group

    return functools.partial(echo_lora_linear_group, backend=backend)


def _lora_update_by(backend: str) -> Callable:
    from .ops.lora_update.autograd import lora_update

    return functools.partial(lora_update, backend=backend)


LOSSES = ("echo_distillation", "echo_distillation_rows", "echo_distillation_linear")


def _loss_by(name: str, backend: str) -> Callable:
    from .ops.echo_distillation import autograd

    return functools.partial(getattr(autograd, name), backend=backend)


def _echo_networks_by(backend: str) -> Callable:
    from .ops.echo_networks.autograd import echo_networks

    return functools.partial(echo_networks, backend=backend)


def _layers_by(backend: str) -> dict[str, Callable[[], Callable]]:
    """The operators that any set of kernels serves; see `ops.echo_lora_linear.kernels`."""
    return {
        "echo_lora_linear": functools.partial(_echo_lora_linear_by, backend),
        "echo_lora_linear_group": functools.partial(_echo_lora_linear_group_by, backend),
        "lora_update": functools.partial(_lora_update_by, backend),
    }


def _losses_by(backend: str) -> dict[str, Callable[[], Callable]]:
    """The same for the losses; see `ops.echo_distillation.kernels`."""
    return {name: functools.partial(_loss_by, name, backend) for name in LOSSES}


def _everything_by(backend: str) -> dict[str, Callable[[], Callable]]:
    """All operators, by a backend that brings all kernels."""
    networks = {"echo_networks": functools.partial(_echo_networks_by, backend)}
    return _layers_by(backend) | _losses_by(backend) | networks


def _reference_echo_lora_linear() -> Callable:
    from .ops.echo_lora_linear.reference import echo_lora_linear

    return echo_lora_linear


def _reference_echo_lora_linear_group() -> Callable:
    from .ops.echo_lora_linear.reference import echo_lora_linear_group

    return echo_lora_linear_group


def _reference_lora_update() -> Callable:
    from .ops.lora_update.reference import lora_update

    return lora_update


def _reference_echo_networks() -> Callable:
    from .ops.echo_networks.reference import echo_networks

    return echo_networks


def _reference_loss(name: str) -> Callable:
    from .ops.echo_distillation import reference

    return getattr(reference, name)


# In order of preference; the reference is last because it always works.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="triton",
        operators=_everything_by("triton"),
        why_unavailable=_why_no_triton,
        preferred_on=("cuda",),
    ),
    Backend(
        name="cuda",
        operators=_layers_by("cuda"),
        why_unavailable=_why_no_cuda,
        preferred_on=("cuda",),
    ),
    Backend(
        name="cpp",
        operators=_everything_by("cpp"),
        why_unavailable=native.why_unavailable,
        preferred_on=("cpu",),
        why_misconfigured=native.why_no_instructions,
    ),
    Backend(
        name="reference",
        operators={
            "echo_lora_linear": _reference_echo_lora_linear,
            "echo_lora_linear_group": _reference_echo_lora_linear_group,
            "lora_update": _reference_lora_update,
            "echo_networks": _reference_echo_networks,
            **{name: functools.partial(_reference_loss, name) for name in LOSSES},
        },
        why_unavailable=_no_reason,
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
    return _by_name(_chosen_name(op, requested, device)).implementation(op)


def _chosen_name(op: str, requested: str | None, device: torch.device | None) -> str:
    wanted = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted is not None:
        backend = _by_name(wanted)
        reason = backend.why_unavailable()
        if reason is None and op in backend.operators:
            return wanted
        if reason is not None or requested is not None:  # the variable speaks for the operators that its backend has
            reason = reason or "it does not implement this operator"
            raise BackendUnavailable(f"backend {wanted!r} cannot run {op}: {reason}")
    # kernels have no rules for vmap, grad and jvp; the reference is made of operators that do
    plain = torch._C._are_functorch_transforms_active()
    for backend in BACKENDS:
        if plain and backend.preferred_on is not None:
            continue
        if op in backend.operators and _preferred(backend, device) and backend.why_unavailable() is None:
            return backend.name
    raise BackendUnavailable(f"no backend can run {op}: {availability()}")


# What `torch.compiler.assume_constant_result` does, less its import of dynamo, which imports triton: a graph that
# torch.compile traces takes the choice as a constant, since the probes cannot be traced.
_chosen_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def availability() -> dict[str, str]:
    """Backend name -> "available", or the reason why it is not or what its first call will raise."""
    return {
        backend.name: backend.why_unavailable() or backend.why_misconfigured() or "available" for backend in BACKENDS
    }


def why(op: str, device: torch.device) -> dict[str, str]:
    """Backend name -> "chosen" for the one that runs `op` on `device` where a call names none, else why it does not.

    Raises:
        ValueError, BackendUnavailable: as `choose` where ECHOLORA_BACKEND asks for what cannot be.
    """
    chosen = _chosen_name(op, None, device)

    def reason(backend: Backend) -> str:
        if backend.name == chosen:
            return "chosen"
        if op not in backend.operators:
            return "does not have it"
        otherwise = f"{chosen} comes first" if _preferred(backend, device) else f"not meant for {device.type} tensors"
        return backend.why_unavailable() or otherwise

    return {backend.name: reason(backend) for backend in BACKENDS}


def running_on(op: str, device: torch.device) -> list[str]:
    """The backends, but the reference, that are meant for `device`, can run here and have `op`."""
    return [
        backend.name
        for backend in BACKENDS
        if backend.preferred_on == (device.type,) and op in backend.operators and backend.why_unavailable() is None
    ]


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(repr(backend.name) for backend in BACKENDS)
    raise ValueError(f"backend: got {name!r}, wants one of {known}")


def _preferred(backend: Backend, device: torch.device | None) -> bool:
    return backend.preferred_on is None or (device is not None and device.type in backend.preferred_on)
