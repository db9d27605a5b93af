"""`EchoLoRALinear` against stock PEFT, and the echo on a PEFT layer against the explicit formula."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from echolora_kernels import Echo, EchoLoRALinear
from echolora_kernels.backends import availability
from echolora_kernels.integrations.adapters import NativeAdapter, adapted_linears
from echolora_kernels.integrations.peft import PeftAdapter

SITES = ["output", "adapter_input", "rank"]
lora_or_dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
bias_or_not = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
rs_or_not = pytest.mark.parametrize("rs", [False, True], ids=["", "rslora"])


def pair(d_in, d_out, r, bias, dora, rs=False, dropout=0.0, dtype=torch.float64, adapter_dtype=None):
    """Our layer and PEFT's, identical, with an adapter that does something."""
    linear = nn.Linear(d_in, d_out, bias, dtype=dtype)
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, use_dora=dora, use_rslora=rs)
    theirs = PeftLinear(linear, "default", config, r=r, lora_alpha=2 * r)
    options = {"lora_alpha": 2 * r, "lora_dropout": dropout, "use_dora": dora, "use_rslora": rs}
    ours = EchoLoRALinear.from_linear(linear, r=r, dtype=adapter_dtype, **options)
    theirs.lora_A.to(adapter_dtype)
    theirs.lora_B.to(adapter_dtype)
    if dora:
        theirs.lora_magnitude_vector.to(ours.magnitude.dtype)  # never narrower than float32
    assert [p.dtype for p in peft_parameters(theirs)] == [p.dtype for p in native_parameters(ours)]
    with torch.no_grad():
        theirs.lora_B["default"].weight.normal_(0, 0.1)
        if dora:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
        for mine, other in zip(native_parameters(ours), peft_parameters(theirs), strict=True):
            mine.copy_(other)
    return ours, theirs


def native_parameters(layer):
    return [p for p in (layer.lora_A, layer.lora_B, layer.magnitude) if p is not None]


def peft_parameters(layer):
    dora = [module.weight for module in layer.lora_magnitude_vector.values()]
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *dora]


def results(layer, parameters, x, upstream, seed=3):
    """y and the gradients of x, A, B, magnitude."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream.to(y.dtype))]


# with dropout only the reference can agree with PEFT: it draws torch's own mask
by_backend = pytest.mark.parametrize(
    ("backend", "dropout"), [("reference", 0.0), ("reference", 0.4), ("cpp", 0.0)], indirect=["backend"]
)


@pytest.fixture
def backend(request, monkeypatch):
    if reason := availability()[request.param].replace("available", ""):
        pytest.skip(reason)
    monkeypatch.setenv("ECHOLORA_BACKEND", request.param)


@lora_or_dora
@bias_or_not
@rs_or_not
@by_backend
def test_float64(dora, bias, rs, backend, dropout):
    ours, theirs = pair(12, 9, 4, bias, dora, rs, dropout)
    x, upstream = torch.randn(3, 7, 12).double(), torch.randn(3, 7, 9).double()
    assert ours.scaling == theirs.scaling["default"]
    mine = results(ours, native_parameters(ours), x, upstream)
    other = results(theirs, peft_parameters(theirs), x, upstream)
    for got, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if dropout:
        assert not torch.allclose(mine[0], results(ours.eval(), native_parameters(ours), x, upstream)[0])


@lora_or_dora
@bias_or_not
def test_float64_in_eval_mode(dora, bias):
    ours, theirs = (layer.eval() for layer in pair(12, 9, 4, bias, dora, dropout=0.4))
    x = torch.randn(7, 12).double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@lora_or_dora
@bias_or_not
@by_backend
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "float32 adapter on bfloat16"],
)
def test_narrow_dtypes_are_as_near_to_float64_as_peft(dtype, adapter_dtype, dora, bias, backend, dropout):
    """Largest and rms error against the same numbers in float64: at most 1.5 times PEFT's."""
    ours, theirs = pair(320, 256, 16, bias, dora, dropout=dropout, dtype=dtype, adapter_dtype=adapter_dtype)
    x, upstream = torch.randn(8, 96, 320).to(dtype), torch.randn(8, 96, 256).to(dtype)
    mine = results(ours, native_parameters(ours), x, upstream)
    other = results(theirs, peft_parameters(theirs), x, upstream)
    assert [t.dtype for t in mine] == [t.dtype for t in other]
    theirs = theirs.double()
    exact = results(theirs, peft_parameters(theirs), x.double(), upstream.double())
    errors = {"max": lambda d: d.abs().max(), "rms": lambda d: d.square().mean().sqrt()}
    report = {}
    for name, got, reference, truth in zip(["y", "x", "A", "B", "magnitude"], mine, other, exact, strict=False):
        for kind, error in errors.items():
            ours_error, peft_error = error(got.double() - truth), error(reference.double() - truth)
            assert 0 < peft_error < 0.02 * truth.abs().max()  # another dropout mask would be far away
            report[name, kind] = round((ours_error / peft_error).item(), 2)
    assert max(report.values()) <= 1.5, report


def echo_pair(site, dora, bias, dropout=0.0):
    """A PEFT layer in a model, an echo for it, an input."""
    _, layer = pair(6, 4, 3, bias, dora, dropout=dropout)
    model = nn.ModuleDict({"proj": layer})
    (adapter,) = adapted_linears(model)
    assert isinstance(adapter, PeftAdapter) and adapter.name == "proj" and adapter.module is layer
    delta = torch.randn(2, adapter.width(site)).double().requires_grad_()
    return layer, adapter, Echo(delta, torch.rand(2, 5) < 0.6, site), torch.randn(2, 5, 6).double()


def behind(site, layer):
    """What stands between the echo and the output: I, G s B A or G s B; the DoRA norm a constant."""
    weight, (a, b, *magnitude), s = layer.base_layer.weight, peft_parameters(layer), layer.scaling["default"]
    if site == "output":
        return torch.eye(len(weight)).double()
    adapted = (weight + s * b @ a).detach()
    gain = (magnitude[0] / adapted.square().sum(1).sqrt())[:, None] if magnitude else 1
    return gain * s * (b @ a if site == "adapter_input" else b)


def compare(layer, echo, got, expected):
    """Outputs, and the gradients of the adapter, the echo."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = [*peft_parameters(layer), echo.delta]
    upstream = torch.randn_like(got)
    found = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


every_site = pytest.mark.parametrize("site", SITES)


@every_site
@lora_or_dora
@bias_or_not
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_echo_on_a_peft_layer(site, dora, bias, dropout):
    """Stock PEFT plus M Delta behind the site; dropout does not touch the echo."""
    layer, adapter, echo, x = echo_pair(site, dora, bias, dropout)
    torch.manual_seed(3)
    plain = layer(x)
    expected = plain + torch.einsum("nt,no->nto", echo.mask.double(), echo.delta @ behind(site, layer).T)
    adapter.install(lambda: echo)
    torch.manual_seed(3)
    compare(layer, echo, layer(x), expected)


@every_site
@lora_or_dora
def test_echo_on_a_transposed_layer(site, dora):
    """GPT-2's Conv1D keeps its weight as [d_in, d_out]: the same echo as on a Linear."""
    linear = pair(6, 4, 3, True, dora)[1]
    conv = Conv1D(4, 6).double()
    with torch.no_grad():
        conv.weight.copy_(linear.base_layer.weight.T)
        conv.bias.copy_(linear.base_layer.bias)
    config = LoraConfig(r=3, lora_alpha=6, use_dora=dora, fan_in_fan_out=True)
    layer = PeftLinear(conv, "default", config, r=3, lora_alpha=6, is_target_conv_1d_layer=True)
    with torch.no_grad():
        for mine, other in zip(peft_parameters(layer), peft_parameters(linear), strict=True):
            mine.data = other.clone()
    foreign, straight = PeftAdapter("conv", layer), PeftAdapter("linear", linear)
    echo = Echo(torch.randn(2, foreign.width(site)).double().requires_grad_(), torch.rand(2, 5) < 0.6, site)
    x, upstream = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 4).double()
    for adapter in (foreign, straight):
        adapter.install(lambda: echo)
    mine = results(layer, [*peft_parameters(layer), echo.delta], x, upstream)
    other = results(linear, [*peft_parameters(linear), echo.delta], x, upstream)
    for got, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_only_linears_are_adapted_linears():
    """Embeddings, convolutions and the attention wrapper of PEFT are left out."""
    modules = {
        "linear": nn.Linear(4, 4),
        "embedding": nn.Embedding(4, 4),
        "conv": nn.Conv2d(4, 4, 1),
        "attention": nn.MultiheadAttention(4, 2),
    }
    config = LoraConfig(r=2, target_modules=list(modules))
    model = get_peft_model(nn.ModuleDict(modules), config)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) >= len(modules)
    names = {adapter.name.rpartition(".")[2] for adapter in adapted_linears(model)}
    assert names & modules.keys() == {"linear"}


@every_site
@lora_or_dora
def test_peft_and_native_echo_agree(site, dora):
    ours, theirs = pair(6, 4, 3, True, dora)
    native, foreign = NativeAdapter("proj", ours), PeftAdapter("proj", theirs)
    assert native.width(site) == foreign.width(site) == {"output": 4, "adapter_input": 6, "rank": 3}[site]
    echo = Echo(torch.randn(2, native.width(site)).double().requires_grad_(), torch.rand(2, 5) < 0.6, site)
    x, upstream = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 4).double()
    for adapter in (native, foreign):
        adapter.install(lambda: echo)
    mine = results(ours, [*native_parameters(ours), echo.delta], x, upstream)
    other = results(theirs, [*peft_parameters(theirs), echo.delta], x, upstream)
    for got, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    if dora:
        torch.testing.assert_close(native.gain(), foreign.gain(), rtol=1e-12, atol=0)
    else:
        assert native.gain() is None and foreign.gain() is None


@pytest.mark.parametrize("kind", [0, 1], ids=["native", "peft"])
@every_site
def test_without_an_echo_the_layer_is_itself(kind, site):
    """read() gives None, and after remove()."""
    layer = pair(6, 4, 3, True, True)[kind]
    adapter = (NativeAdapter, PeftAdapter)[kind]("proj", layer)
    x = torch.randn(2, 5, 6).double()
    plain, now = layer(x), [None]
    handle = adapter.install(lambda: now[0])
    assert torch.equal(layer(x), plain)
    now[0] = Echo(torch.ones(2, adapter.width(site)).double(), torch.ones(2, 5), site)
    assert not torch.equal(layer(x), plain)
    with pytest.raises(ValueError, match=r"^proj: got activations of shape \(2, 4, \d\), wants \[2, 5, width\]"):
        layer(x[:, :4])
    handle.remove()
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.merge(), "merged"),
        (lambda layer: layer.enable_adapters(False), "disabled"),
        (lambda layer: setattr(layer, "_active_adapter", []), "active"),
    ],
)
def test_why_a_peft_layer_is_inactive(change, reason):
    adapter = PeftAdapter("proj", pair(6, 4, 3, True, False)[1])
    assert adapter.why_inactive() is None
    change(adapter.module)
    assert reason in adapter.why_inactive()


def test_two_active_adapters_take_an_echo_at_the_output_only():
    layer = pair(6, 4, 3, True, False)[1]
    layer.update_layer("second", 2, lora_alpha=4, config=LoraConfig(r=2))
    layer.set_adapter(["default", "second"])
    adapter = PeftAdapter("proj", layer)
    assert adapter.width("output") == 4
    for site in SITES[1:]:
        with pytest.raises(ValueError, match=r"^proj: got active adapters .*second.*wants exactly one"):
            adapter.width(site)
