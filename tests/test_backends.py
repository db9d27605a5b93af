"""Which backend runs, and what is said when it cannot."""

import inspect

import pytest
import torch

from echolora_kernels import BackendUnavailable, backends, functional, losses, reference
from echolora_kernels.ops.echo_distillation.reference import echo_distillation
from echolora_kernels.ops.echo_lora_linear.reference import echo_lora_linear
from echolora_kernels.ops.echo_networks.reference import echo_networks

REFERENCE = {
    "echo_lora_linear": echo_lora_linear,
    "echo_networks": echo_networks,
    "echo_distillation": echo_distillation,
}
OPS = list(REFERENCE)


def marked(name, reason=None, ops=("echo_lora_linear",)):
    """A backend whose implementations can be told from the reference's."""
    return backends.Backend(name, {op: lambda: reference.dora_norm for op in ops}, lambda: reason)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("ECHOLORA_BACKEND", raising=False)


@pytest.fixture
def put_first(monkeypatch):
    def put(*extra):
        monkeypatch.setattr(backends, "BACKENDS", (*extra, *backends.BACKENDS))

    return put


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("requested", [None, "reference"])
def test_the_reference_has_every_operator(op, requested):
    assert backends.choose(op, requested) is REFERENCE[op]


def test_automatic_choice_takes_the_first(put_first):
    put_first(marked("fast"))
    assert backends.choose("echo_lora_linear") is reference.dora_norm
    assert backends.choose("echo_lora_linear", "reference") is echo_lora_linear


@pytest.mark.parametrize("from_environment", [False, True])
def test_unknown_name(from_environment, monkeypatch, put_first):
    put_first(marked("fast"))
    if from_environment:
        monkeypatch.setenv("ECHOLORA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^backend: got 'nonsense', wants one of 'fast', 'triton', .*'reference'$"):
        backends.choose("echo_lora_linear", None if from_environment else "nonsense")


@pytest.mark.parametrize("from_environment", [False, True])
def test_a_named_backend_that_cannot_run_says_why(from_environment, monkeypatch, put_first):
    put_first(marked("fast", "there is no such device"))
    if from_environment:
        monkeypatch.setenv("ECHOLORA_BACKEND", "fast")
    with pytest.raises(BackendUnavailable, match="'fast' cannot run echo_lora_linear: there is no such device"):
        backends.choose("echo_lora_linear", None if from_environment else "fast")


def test_automatic_choice_skips_what_cannot_run(put_first):
    put_first(marked("fast", "there is no such device"), marked("other", None, ["echo_networks"]))
    assert backends.choose("echo_lora_linear") is echo_lora_linear
    assert backends.choose("echo_networks") is reference.dora_norm


def test_a_named_backend_without_the_operator(put_first):
    put_first(marked("other", None, ["echo_networks"]))
    with pytest.raises(BackendUnavailable, match=r"'other' cannot run echo_lora_linear: .*not implement"):
        backends.choose("echo_lora_linear", "other")


def test_environment_is_honoured_and_an_argument_wins(monkeypatch, put_first):
    put_first(marked("fast"))
    monkeypatch.setenv("ECHOLORA_BACKEND", "reference")
    assert backends.choose("echo_lora_linear") is echo_lora_linear
    assert backends.choose("echo_lora_linear", "fast") is reference.dora_norm
    monkeypatch.setenv("ECHOLORA_BACKEND", "")
    assert backends.choose("echo_lora_linear") is reference.dora_norm


def test_the_environment_speaks_for_the_operators_its_backend_has(monkeypatch, put_first):
    put_first(marked("fast"))
    monkeypatch.setenv("ECHOLORA_BACKEND", "fast")
    assert backends.choose("echo_networks") is echo_networks
    with pytest.raises(BackendUnavailable, match="not implement"):
        backends.choose("echo_networks", "fast")


def test_nothing_can_run(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (marked("fast", "there is no such device"),))
    with pytest.raises(BackendUnavailable, match=r"no backend can run echo_networks.*there is no such device"):
        backends.choose("echo_networks")


def test_availability(put_first):
    put_first(marked("fast", "there is no such device"))
    found = backends.availability()
    assert list(found) == [backend.name for backend in backends.BACKENDS]
    assert (found["fast"], found["reference"]) == ("there is no such device", "available")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (functional.echo_lora_linear, (*[torch.ones(1, 1)] * 2, None, *[torch.ones(1, 1)] * 2, 1.0)),
        (
            functional.echo_networks,
            (torch.ones(1, 1), torch.ones(2, 1), *[torch.ones(1, 1)] * 2, *[torch.ones(1)] * 2, [1]),
        ),
        (losses.echo_distillation, (torch.ones(1, 2, 3), None, torch.ones(1, 2, dtype=torch.int64))),
        (losses.echo_distillation_rows, (torch.ones(2, 3), None, torch.ones(2, dtype=torch.int64))),
        (losses.echo_distillation_linear, (torch.ones(2, 3), None, torch.ones(4, 3), torch.ones(2, dtype=torch.int64))),
    ],
    ids=[*OPS, "echo_distillation_rows", "echo_distillation_linear"],
)
def test_every_public_function_passes_the_name_on(function, arguments):
    function(*arguments, backend="reference")
    with pytest.raises(ValueError, match=r"^backend: got 'nonsense'"):
        function(*arguments, backend="nonsense")


def test_the_reference_as_a_drop_in(monkeypatch, put_first):
    """Same signature as `functional`'s, and the reference whatever is first or in the environment."""
    put_first(marked("fast"))
    monkeypatch.setenv("ECHOLORA_BACKEND", "fast")
    ours, theirs = (inspect.signature(m.echo_lora_linear).parameters for m in (reference, functional))
    assert list(ours.values()) == list(theirs.values())
    arguments = (torch.randn(5, 4), torch.randn(3, 4), torch.randn(3), torch.randn(2, 4), torch.randn(3, 2), 0.7)
    for name in (None, "reference"):
        y = reference.echo_lora_linear(*arguments, magnitude=torch.ones(3), backend=name)
        assert torch.equal(y, echo_lora_linear(*arguments, magnitude=torch.ones(3)))
    with pytest.raises(ValueError, match=r"^backend: got 'fast', wants 'reference'"):
        reference.echo_lora_linear(*arguments, backend="fast")
