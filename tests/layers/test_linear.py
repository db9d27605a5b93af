"""`EchoLoRALinear`: drop-in, frozen base, merging, saving."""

import copy
import math

import pytest
import torch
from torch import nn

from echolora_kernels import Echo, EchoLoRALinear
from echolora_kernels.functional import echo_lora_linear

D_IN, D_OUT, RANK = 6, 4, 3
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rs-dora": {"use_dora": True, "use_rslora": True},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
bias_or_not = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


def trained(bias=True, dtype=torch.float64, **options):
    """A layer whose adapter does something."""
    layer = EchoLoRALinear(D_IN, D_OUT, bias, r=RANK, lora_alpha=7, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.rand(D_OUT).to(dtype) + 0.5)
    return layer


def inputs(dtype=torch.float64):
    return torch.randn(2, 5, D_IN, dtype=dtype)


def state_of(layer):
    return {name: t.clone() for name, t in layer.state_dict().items()}


@every_kind
@bias_or_not
@pytest.mark.parametrize("make", ["from_linear", "constructor"])
def test_starts_as_the_frozen_layer(options, bias, make):
    if make == "from_linear":
        linear = nn.Linear(D_IN, D_OUT, bias).double()
        layer = EchoLoRALinear.from_linear(linear, r=RANK, **options)
    else:
        layer = EchoLoRALinear(D_IN, D_OUT, bias, r=RANK, dtype=torch.float64, **options)
    x = inputs()
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    if layer.magnitude is None:
        assert torch.equal(layer(x), expected)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(D_IN)  # kaiming-uniform with a = sqrt 5
    assert 0.5 * bound < layer.lora_A.abs().max() <= bound


@bias_or_not
@pytest.mark.parametrize("training", [False, True])
def test_from_linear_shares_the_storage(bias, training):
    linear = nn.Linear(D_IN, D_OUT, bias).train(training)
    layer = EchoLoRALinear.from_linear(linear, r=RANK)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.r) == (D_IN, D_OUT, RANK)
    assert layer.training is training


@every_kind
@bias_or_not
def test_only_the_adapter_trains(options, bias):
    layer = trained(bias, **options)
    shapes = {"lora_A": (RANK, D_IN), "lora_B": (D_OUT, RANK)}
    if options.get("use_dora"):
        shapes["magnitude"] = (D_OUT,)
    trainable = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == shapes
    before = state_of(layer)
    layer(inputs()).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    moved = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == shapes.keys()


@pytest.mark.parametrize(("rs", "expected"), [(False, 7 / 4), (True, 7 / 2)])
def test_scaling(rs, expected):
    layer = EchoLoRALinear(D_IN, D_OUT, r=4, lora_alpha=7, use_rslora=rs, bias=False, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = inputs()
    update = x @ (layer.lora_B @ layer.lora_A).T
    assert layer.scaling == expected
    torch.testing.assert_close(layer(x), x @ layer.weight.T + expected * update, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("site", "width"), [("output", D_OUT), ("adapter_input", D_IN), ("rank", RANK)])
@every_kind
def test_forward_hands_everything_to_the_operator(options, site, width):
    layer = trained(**options)
    echo = Echo(torch.randn(2, width).double(), torch.rand(2, 5) < 0.5, site)
    x = inputs()
    base = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    expected = echo_lora_linear(*base, magnitude=layer.magnitude, echo=echo)
    assert torch.equal(layer(x, echo), expected)
    assert torch.equal(layer(x, echo=echo), expected)
    assert not torch.equal(layer(x), expected)


@every_kind
@bias_or_not
def test_merged_equals_unmerged_and_unmerge_is_exact(options, bias):
    layer = trained(bias, **options).eval()
    x, before, original = inputs(), state_of(layer), layer.weight
    expected = layer(x)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merged = layer.weight.clone()
    assert not layer.weight.requires_grad
    layer.merge()  # again: nothing happens
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is original
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


@every_kind
@bias_or_not
@pytest.mark.parametrize("merge_first", [False, True])
def test_merged_linear(options, bias, merge_first):
    """An ordinary layer of its own: the adapted one does not change with it."""
    layer = trained(bias, **options).eval()
    x = inputs()
    expected = layer(x)
    if merge_first:
        layer.merge()
    linear = layer.merged_linear()
    assert type(linear) is nn.Linear
    assert linear.training is False
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_a_merged_layer_moved_to_another_dtype_still_unmerges():
    layer = trained(dtype=torch.float32)
    weight = layer.weight.clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, weight.double())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@bias_or_not
def test_state_dict_round_trip(options, bias):
    layer, other = trained(bias, **options), trained(bias, **options)
    keys = {"weight", "lora_A", "lora_B"} | ({"bias"} if bias else set()) | ({"magnitude"} if options else set())
    assert layer.state_dict().keys() == keys
    x = inputs()
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_state_dict_of_a_merged_layer_is_refused():
    model = nn.Sequential(nn.Linear(D_IN, D_IN), trained())
    model[1].merge()
    with pytest.raises(RuntimeError, match=r"^1: a merged layer.*unmerge\(\) first, or use merged_linear"):
        model.state_dict()
    model[1].unmerge()
    model.state_dict()


def test_a_merged_layer_refuses_a_state():
    """Its weight is not the one in the state; nothing changes."""
    layer, other = trained(), trained()
    x = inputs()
    layer.merge()
    expected = layer(x)
    with pytest.raises(RuntimeError, match="merged"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)


def test_a_merged_layer_refuses_an_echo():
    layer = trained()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"echo: the layer is merged"):
        layer(inputs(), Echo(torch.zeros(2, D_OUT).double(), torch.ones(2, 5)))


@every_kind
def test_dropout_only_while_training(options):
    layer = trained(lora_dropout=0.5, **options)
    x = inputs()
    without = layer.eval()(x)
    assert torch.equal(layer(x), without)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.allclose(first, without)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("r", [0, -1, 1.5, True, "4", None])
@pytest.mark.parametrize("make", ["from_linear", "constructor"])
def test_bad_rank(r, make):
    linear = nn.Linear(D_IN, D_OUT)
    with pytest.raises(ValueError, match=r"^r: got .*wants an integer of at least 1"):
        EchoLoRALinear.from_linear(linear, r=r) if make == "from_linear" else EchoLoRALinear(D_IN, D_OUT, r=r)
    assert linear.weight.requires_grad  # nothing half-changed


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_dropout(p):
    linear = nn.Linear(D_IN, D_OUT)
    with pytest.raises(ValueError, match=r"^lora_dropout: got .*wants"):
        EchoLoRALinear.from_linear(linear, lora_dropout=p)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("module", [nn.Conv1d(6, 4, 1), nn.Embedding(4, 6), None])
def test_from_linear_wants_a_linear(module):
    with pytest.raises(TypeError, match=r"^linear: got .*wants torch\.nn\.Linear"):
        EchoLoRALinear.from_linear(module)


@every_kind
@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_is_independent(options, merged):
    layer = trained(**options).eval()
    x = inputs()
    expected = layer(x)
    if merged:
        layer.merge()
    twin = copy.deepcopy(layer)
    layer.unmerge()
    torch.testing.assert_close(twin(x), expected, rtol=1e-12, atol=1e-12)
    twin.unmerge()
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


@every_kind
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_bfloat16(options, adapter):
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    layer = EchoLoRALinear.from_linear(linear, r=8, dtype=adapter, **options)
    nn.init.normal_(layer.lora_B)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {adapter}
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    exact = copy.deepcopy(layer).double()(x.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < 2**-6 * exact.abs().max()
    y.sum().backward()
    assert (x.grad.dtype, layer.lora_A.grad.dtype) == (torch.bfloat16, adapter)
    layer.merge()
    assert layer.weight.dtype == torch.bfloat16
    assert (layer(x).double() - exact).abs().max() < 2**-6 * exact.abs().max()
    layer.unmerge()
    assert layer.weight is linear.weight


@every_kind
def test_meta_device(options):
    layer = EchoLoRALinear(D_IN, D_OUT, r=RANK, device="meta", **options)
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_repr_says_what_it_is():
    text = repr(EchoLoRALinear(D_IN, D_OUT, False, r=RANK, use_dora=True))
    assert all(part in text for part in ("6, 4, bias=False, r=3", "lora_alpha=32", "use_dora=True", "use_rslora=False"))
