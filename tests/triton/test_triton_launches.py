"""How often the kernels are launched: a fusion that falls apart shows here."""

import types

import pytest
import torch
from linear_cases import SITES
from triton_cases import NORM, make

from echolora_kernels.ops.echo_lora_linear import launch
from echolora_kernels.ops.echo_lora_linear.configs import Tile
from echolora_kernels.ops.echo_lora_linear.launch import Launch

FORWARD = ["shrink_fwd_kernel", "linear_fwd_kernel"]
BACKWARD = ["adapter_bwd_kernel", "lora_a_bwd_kernel", "input_bwd_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_two_forward_and_three_backward(launches, site, dora, p):
    make(site=site, dora=dora, p=p).results("triton")
    assert launches == (NORM if dora else []) + FORWARD + BACKWARD


def test_no_gradient_no_backward(launches):
    make(dora=True).results("triton", ())
    assert launches == [*NORM, *FORWARD]


def test_only_what_is_needed(launches):
    case = make(site="output", dora=True)
    expected = {
        ("lora_b",): BACKWARD[:1],
        ("magnitude",): BACKWARD[:1],
        ("delta",): BACKWARD[:1],
        ("lora_a",): BACKWARD[:2],
        ("x",): [BACKWARD[0], BACKWARD[2]],
        ("lora_a", "lora_b"): BACKWARD[:2],
    }
    for needs, kernels in expected.items():
        launches.clear()
        case.results("triton", needs)
        assert launches[len(NORM + FORWARD) :] == kernels, needs


def test_a_thick_adapter_reads_the_gradient_twice(launches):
    make(r=65).results("triton")
    assert launches == [*FORWARD, "shrink_fwd_kernel", *BACKWARD]


def test_nothing_is_launched_for_an_empty_batch(launches):
    make(n=0).results("triton")
    assert launches == []


def test_the_matrix_instructions_see_ds_in_the_dtype_of_x(monkeypatch):
    """It is summed in float32, in which they are slower."""
    seen, run = {}, Launch.run

    def record(planned, device, **tensors):
        if "ds" in tensors:
            seen[planned.kernel.fn.__name__] = tensors["ds"].dtype
        run(planned, device, **tensors)

    monkeypatch.setattr(Launch, "run", record)
    make(dtype=torch.float16).results("triton")
    assert seen == dict(zip(BACKWARD, (torch.float32, torch.float16, torch.float16), strict=True))


@pytest.mark.parametrize("hooked", [False, True])
def test_triton_s_hooks_are_called_where_there_are_any(monkeypatch, hooked):
    """As its own dispatch calls them: with what it tells of a launch."""
    given = []

    class Compiled:
        function, packed_metadata = "function", "packed"

        def launch_metadata(self, grid, stream, *values):
            return ("metadata", grid, stream, values)

        def run(self, *arguments):
            given.append(arguments)

    hooks = launch.triton.knobs.runtime
    monkeypatch.setattr(hooks, "launch_enter_hook", type(hooks.launch_enter_hook)())
    if hooked:
        hooks.launch_enter_hook.add(print)
    monkeypatch.setattr(launch, "_stream", lambda: lambda index: 7)
    plan = Launch(types.SimpleNamespace(arg_names=["x", "N"]), (3,), Tile(16, 16, 16, 4, 1), N=5)
    x = torch.zeros(4)
    plan._compiled[None, x.dtype, not x.data_ptr() & 15] = Compiled()
    plan.run(x.device, x=x)
    values = (x.data_ptr(), 5)
    told = ("metadata", (3, 1, 1), 7, values) if hooked else None
    enter = hooks.launch_enter_hook if hooked else None
    assert given == [(3, 1, 1, 7, "function", "packed", told, enter, None, *values)]
