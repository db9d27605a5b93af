"""The library's operators called directly: what they refuse, by which words, and what they leave alone."""

import itertools
import json
import re
import sys

import pytest
import torch
from linear_cases import make as make_layer
from native_cases import ROOT, run
from operator_cases import D_IN, D_OUT, NEEDS, OPERATORS, N, R, T, call, make, written

from echolora_kernels import native

if reason := native.why_unavailable():
    pytest.skip(reason, allow_module_level=True)

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = [
    (operator, name)
    for operator in OPERATORS
    for name, value in make(operator).items()
    if isinstance(value, torch.Tensor)
]
SAYS_ITS_WIDTH = (("drop", "x"), ("lora_a_backward", "ds"))  # alone, so that any width is right
ANY_STRIDES = ("x", "dy", "a", "b", "s", "ds", "weight", "off", "on", "d_off", "d_on")
MUST_BE_DENSE = (
    "z", "base", "gain", "bias", "delta", "mask", "product", "dx", "y", "magnitude", "targets", "stats", "scales",
    "u", "down", "proj_up", "gate_up", "gate_bias", "scale", "ddelta", "h",
)  # fmt: skip


@pytest.fixture
def uninitialized_is_nan():
    """Memory that nothing has written shows in results."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def refused(operator, arguments):
    """The message, one line that says what it got and what it wants."""
    with pytest.raises(RuntimeError) as raised:
        call(operator, arguments)
    message = str(raised.value)
    assert re.fullmatch(r"[\w ]+: got .+, wants .+", message), message
    return message


def test_every_operator_is_tested_here():
    source = (ROOT / "csrc" / "library.cpp").read_text()
    assert {name for name, first in re.findall(r'm\.def\(\s*"(\w+)\((\w*)', source) if first} == set(OPERATORS)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_are_never_written(operator, dtype, uninitialized_is_nan):
    arguments = make(operator, dtype)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for result in call(operator, arguments).values():
        assert result.isfinite().all()
    for name, value in before.items():
        assert torch.equal(arguments[name], value) != (name in written(operator)), name


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_another_dtype(operator, name):
    arguments = make(operator)
    arguments[name] = arguments[name].int()
    wanted = {"seed": "one Long element", "targets": "Long"}.get(name, "Float")
    assert re.match(f"{name}: got dtype Int, wants .*{wanted}", refused(operator, arguments))


@pytest.mark.parametrize("operator", OPERATORS)
def test_mixed_dtypes_are_refused_or_right(operator):
    """Each floating argument in each dtype beside the others in one; right is what float64 gives."""
    for dtype, other in itertools.permutations(ELEMENTS, 2):
        for name, value in make(operator).items():
            if not isinstance(value, torch.Tensor) or name in ("seed", "targets", *written(operator)):
                continue
            arguments = make(operator, dtype)
            arguments[name] = arguments[name].to(other)
            exact = {
                key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for key, value in arguments.items()
            }
            try:
                got = call(operator, arguments)
            except RuntimeError as error:
                assert re.fullmatch(r"[\w ]+: got dtype .+, wants .+", str(error)), error
                continue
            tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(other).eps)
            for key, want in call(operator, exact).items():
                assert (got[key] - want).abs().max() < tolerance * want.abs().max(), (name, dtype, other, key)


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_another_shape(operator, name):
    # a dimension more or less (rows may have two or three), or twice the width
    changes = (lambda t: t[None] if t.dim() == 3 else t[0] if t.dim() > 1 else t.repeat(2),
               lambda t: t.repeat(*[1] * (t.dim() - 1), 2))  # fmt: skip
    for change in changes:
        arguments = make(operator)
        arguments[name] = change(arguments[name])
        if (operator, name) in SAYS_ITS_WIDTH and arguments[name].dim() == make(operator)[name].dim():
            continue
        message = refused(operator, arguments)
        got = "dtype Long" if name == "seed" else "shape"
        named = message.split(":")[0]
        # a size that two arguments share is the first one's
        assert named == name or (arguments[name].dim() == make(operator)[name].dim() and got in message), message
        assert arguments[name].dim() != 3 or re.search(r"shape \[\d+(, \d+)*\]|\d+ contiguous elements", message)


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_vectors_and_results_with_gaps(operator, name):
    arguments = make(operator)
    spread = torch.stack([arguments[name]] * 2, -1)[..., 0]
    arguments[name] = spread
    assert name == "seed" or not spread.is_contiguous()
    if name in MUST_BE_DENSE:
        assert re.match(rf"{name}: got .+, wants \d+ contiguous elements", refused(operator, arguments))
    else:
        call(operator, arguments)


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_another_device(operator, name):
    """The dispatcher refuses before the library is asked: it names the operator."""
    arguments = make(operator)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(NotImplementedError, match=f"echolora::{operator}.*Meta"):
        call(operator, arguments)


@pytest.mark.parametrize("rank", [0, 257])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if {"a", "b", "ds"} & set(make(name))])
def test_another_rank(operator, rank):
    arguments = make(operator)
    for name, dimension in {"a": 0, "b": 1, "s": 1, "ds": 1}.items():
        if name in arguments:
            shape = list(arguments[name].shape)
            shape[dimension] = rank
            arguments[name] = torch.zeros(shape)
    assert re.match(r"\w+: got shape .*, wants a rank from 1 to 256", refused(operator, arguments))


LACKS = [
    ("shrink", "seed", {}, "seed: got None, wants a tensor where drop_below is not 0"),
    ("shrink", "delta", {"site": 1}, "delta and mask: got None, wants tensors for an echo inside the adapter"),
    ("shrink", "mask", {"site": 2}, "delta and mask: got None, wants tensors for an echo inside the adapter"),
    ("linear_epilogue", "mask", {}, "mask: got None, wants .* where delta is given"),
    ("linear_epilogue", "z", {}, "z: got None, wants a tensor where base is given"),
    ("adapter_backward", "s", {}, "s: got None, wants a tensor where need_db .*is set"),
    ("adapter_backward", "z", {}, "z: got None, wants a tensor where need_dgain is set"),
    ("adapter_backward", "mask", {}, "mask: got None, wants a tensor where need_ddelta is set"),
    ("lora_a_backward", "seed", {}, "seed: got None, wants a tensor where drop_below is not 0"),
    ("lora_a_backward", "mask", {}, "mask: got None, wants .* where delta is given"),
    ("input_epilogue", "seed", {}, "seed: got None, wants a tensor where drop_below is not 0"),
    ("linear_forward", "seed", {}, "seed: got None, wants a tensor where drop_below is not 0"),
    ("linear_forward", "mask", {}, "delta and mask: got None, wants tensors for an echo inside the adapter"),
    ("linear_forward", "z", {}, "z: got None, wants a tensor where base is given"),
    ("linear_backward", "seed", {}, "seed: got None, wants a tensor where drop_below is not 0"),
    ("linear_backward", "a", {}, "a: got None, wants a tensor where dx is given"),
    ("distillation", "scales", {}, "scales: got None, wants a tensor where d_off or d_on is given"),
    ("distillation", "on", {}, "on: got None, wants a tensor where d_on is given"),
    ("distillation_backward", "on", {}, "on: got None, wants a tensor where d_on is given"),
    ("linear_backward", "mask", {"need_ddelta": False}, "mask: got None, wants .* where delta is given"),
]


@pytest.mark.parametrize(("operator", "name", "others", "message"), LACKS)
def test_arguments_that_belong_together(operator, name, others, message):
    arguments = {**make(operator), **others}
    if operator == "shrink" and others.get("site") == 2:
        arguments["delta"] = torch.randn(N, R)
    call(operator, arguments)
    arguments[name] = None
    assert re.fullmatch(message, refused(operator, arguments))


@pytest.mark.parametrize("operator", ["shrink", "linear_forward"])
@pytest.mark.parametrize("site", [-1, 4])
def test_another_site(operator, site):
    assert re.match(rf"site: got {site}, wants 0, 1", refused(operator, {**make(operator), "site": site}))


@pytest.mark.parametrize("below", [-1, 2**24 + 1])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if "drop_below" in make(name)])
def test_another_threshold(operator, below):
    assert re.match(f"drop_below: got {below}, wants", refused(operator, {**make(operator), "drop_below": below}))


def test_a_z_to_be_stored():
    arguments = {**make("linear_epilogue"), "store_z": True}
    assert refused("linear_epilogue", arguments) == "store_z: got True, wants False for CPU tensors"


@pytest.mark.parametrize("operator", ["distillation", "distillation_backward"])
def test_another_target_or_temperature(operator):
    for target in (-1, -101, D_OUT):
        arguments = make(operator)
        arguments["targets"][-1] = target
        assert refused(operator, arguments) == f"targets: got {target}, wants -100 or a column of {D_OUT}"
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        assert re.match("temperature: got", refused(operator, {**make(operator), "temperature": temperature}))


@pytest.fixture(scope="module")
def of_empty():
    """(operator, which size is 0) -> what is wrong; a crash ends no more than its own case."""
    done = run([sys.executable, "tests/native/empty_cases.py"])
    assert done.returncode == 0, done.stderr
    return {(operator, label): said for operator, label, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("label", ["no samples", "no positions", "no input", "no output"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_empty(operator, label, of_empty):
    assert of_empty[operator, label] == ""


def layouts(tensor):
    """The same values under other strides."""
    yield tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    yield torch.stack([tensor, tensor], -1)[..., 0]
    if tensor.dim() == 3:
        yield tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        yield torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, n in TENSORS if n in ANY_STRIDES])
def test_any_strides(operator, name, dtype, uninitialized_is_nan):
    """What contiguous arguments give, but for the last bits of what is summed in the order that B lies in."""
    sizes = {"n": 3, "t": 37, "d_in": 150, "d_out": 141}
    for index in range(len(list(layouts(make(operator, **sizes)[name])))):
        torch.manual_seed(index)
        arguments = make(operator, dtype, **sizes)
        torch.manual_seed(index)
        others = make(operator, dtype, **sizes)
        others[name] = list(layouts(others[name]))[index]
        assert not others[name].is_contiguous() and torch.equal(others[name], arguments[name])
        got = call(operator, others)
        for key, want in call(operator, arguments).items():
            assert (got[key] - want).abs().max() <= 4 * torch.finfo(want.dtype).eps * want.abs().max(), key


@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, n in TENSORS if n in ("x", "dy", "off", "on")])
def test_expanded_rows(operator, name):
    for shape in ((1, 1, 1), (1, T, 1), (N, 1, 1), (1, 1, D_IN if name == "x" else D_OUT)):
        torch.manual_seed(0)
        arguments = make(operator)
        torch.manual_seed(0)
        others = make(operator)
        expanded = torch.randn(shape).expand_as(arguments[name])
        arguments[name], others[name] = expanded.contiguous(), expanded
        want, got = call(operator, arguments), call(operator, others)
        assert all(torch.equal(got[key], value) for key, value in want.items())
        assert torch.equal(expanded, arguments[name])


@pytest.mark.parametrize("operator", ["adapter_backward", "linear_backward"])
def test_what_is_not_needed_is_empty_and_changes_nothing_else(operator):
    torch.manual_seed(0)
    everything = call(operator, make(operator))
    for index, need in enumerate(NEEDS):
        torch.manual_seed(0)
        arguments = {**make(operator), **dict.fromkeys(NEEDS, False), need: True}
        if operator == "linear_backward":
            arguments |= {"x": None, "dx": None, "delta": None}
        results = call(operator, arguments)
        for other in range(len(NEEDS)):
            if other == index:
                assert torch.equal(results[str(other)], everything[str(other)]), need
            else:
                assert results[str(other)].numel() == 0, (need, other)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("site", [None, "output", "adapter_input", "rank"])
def test_a_layer_reads_nothing_that_it_has_not_written(site, dtype):
    """Workspaces and results that begin as NaN give the same bits."""
    found = []
    for fill in (False, True):
        torch.manual_seed(0)
        case = make_layer("cpp", 3, 37, 150, 141, 12, site=site, dora=True, p=0.3, dtype=dtype)
        torch.use_deterministic_algorithms(fill)
        try:
            found.append(case.results("cpp"))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
