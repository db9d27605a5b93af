"""Fused PEFT models on quantised bases against the same models as PEFT computes them, and against float64."""

import copy

import pytest
import torch
from fuse_cases import moved, results
from linear_cases import error_ratios
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import TARGETS, always_on, base_model, batch, randomise
from torch import nn

from echolora_kernels import EchoLoRA, fuse, unfuse
from echolora_kernels.integrations import quantised

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed (pip install torchao)")

D_IN, D_OUT = 128, 64


def four_bit(linear, **options):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which quantises


def eight_bit(linear):
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def by_torchao(linear):
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(version=2))
    return linear


SCHEMES = {
    "nf4": lambda linear: four_bit(linear, quant_type="nf4", compress_statistics=False),
    "nf4-nested": lambda linear: four_bit(linear, quant_type="nf4"),
    "fp4": lambda linear: four_bit(linear, quant_type="fp4", compress_statistics=False),
    "int8": eight_bit,
    "torchao": by_torchao,
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_library = pytest.mark.parametrize("scheme", ["nf4-nested", "int8", "torchao"])


class Net(nn.Module):
    def __init__(self, scheme, bias=True):
        super().__init__()
        self.first = SCHEMES[scheme](nn.Linear(D_IN, D_OUT, bias).requires_grad_(False))
        self.second = SCHEMES[scheme](nn.Linear(D_OUT, D_IN, bias).requires_grad_(False))
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = "4" in scheme, scheme == "int8"

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(**options):
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["first", "second"], **options})


def net(scheme, bias=True, **options):
    return moved(get_peft_model(Net(scheme, bias), config(**options))).train()


def assert_same(got, wanted, tolerance=2e-5):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of our operator by a fused layer."""
    made, operator = [], quantised.lora_update
    monkeypatch.setattr(quantised, "lora_update", lambda *a, **named: made.append(named) or operator(*a, **named))
    return made


@every_scheme
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", ["lora", "dora", "lora_bias"])
def test_outputs_and_gradients_are_those_of_peft(kind, backend, scheme, calls):
    if kind == "lora_bias" and scheme == "torchao":
        pytest.skip("PEFT has no lora_bias there")
    options = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}.get(kind, {})
    for bias in (False, True):
        model, x = net(scheme, bias, **options), torch.randn(3, 7, D_IN)
        state, wanted = model.state_dict(), results(copy.deepcopy(model), x)
        assert len(wanted) == 2 + 2 * (2 + (kind != "lora"))
        report = fuse(model, backend=backend, strict=True)
        assert report.fused == ("base_model.model.first", "base_model.model.second") and not report.skipped
        calls.clear()
        assert_same(results(model, x), wanted)
        assert [call["backend"] for call in calls] == [backend] * 2
        assert [*model.state_dict()] == [*state]
        unfuse(model)
        assert not any("forward" in module.__dict__ for module in model.modules())


def exact(module, dtype=torch.float64):
    """The same LoRA layer on a plain linear with the dequantised weight."""
    base = module.base_layer
    plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(torch.cat([*quantised.dequantised_rows(base)]))
        if base.bias is not None:
            plain.bias.copy_(base.bias)
    options = {"r": module.r["default"], "lora_alpha": module.lora_alpha["default"], "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(plain), LoraConfig(**options, use_dora="default" in module.lora_variant))
    layer = model.base_model.model[0].to(dtype)
    with torch.no_grad():
        for mine, other in zip(layer.parameters(), module.parameters(), strict=True):
            if mine.requires_grad:
                mine.copy_(other)
    return layer


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True])
@each_library
def test_bfloat16_is_as_near_to_float64_as_peft(scheme, autocast, kind, calls):
    """float32 adapters on bfloat16 activations: the largest and the rms error are at most 1.5 times PEFT's."""
    layer = net(scheme, r=16, use_dora=kind == "dora").base_model.model.first
    layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    if scheme == "torchao":
        layer.base_layer = by_torchao(copy.deepcopy(exact(layer, torch.bfloat16).base_layer))
    x = torch.randn(8, 96, D_IN).bfloat16()
    wanted = results(exact(layer), x.double())

    def run(layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(layer, x)

    peft = run(copy.deepcopy(layer))
    fuse(layer)
    ours = run(layer)
    assert len(calls) == 1 and {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in peft.items()}
    ratios = error_ratios(ours, peft, wanted)
    assert max(max(pair) for pair in ratios.values()) <= 1.5, ratios


def both(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def second_adapter(model):
    model.add_adapter("other", config(r=2))
    moved(model)


def hook(model):
    model.base_model.model.first.base_layer.register_forward_hook(lambda module, args, output: 3 * output)


# what happens to a model after it was fused -> how many of its two layers our operator then computes
CHANGES = {
    "another adapter": (lambda model: (second_adapter(model), model.set_adapter("other")), 2),
    "two active adapters": (both, 0),
    "merged": (lambda model: model.merge_adapter(), 0),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "a hook on the base layer": (hook, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_the_model_afterwards(change, calls):
    model, x = net("nf4"), torch.randn(3, 7, D_IN)
    changed, used = CHANGES[change]
    stock = copy.deepcopy(model)
    fuse(model)
    for one in (model, stock):
        torch.manual_seed(5)
        changed(one)
    assert_same(results(model, x), results(stock, x))
    assert len(calls) == used


@every_scheme
def test_what_a_hook_on_the_base_layer_sees_stays_as_it_was(scheme, calls):
    layer, seen = net(scheme).base_model.model.first, []
    x = torch.randn(3, D_IN)
    fuse(layer)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    layer(x)
    assert len(calls) == 1 and torch.equal(*seen[0])


def test_adapters_mixed_in_a_batch(calls):
    model, x = net("nf4").eval(), torch.randn(3, 4, D_IN)
    names = {"adapter_names": ["default", "__base__", "default"]}
    with torch.no_grad():
        wanted = model(x, **names)
        fuse(model)
        assert torch.equal(model(x, **names), wanted) and not calls


def test_dropout_has_the_same_statistics(calls):
    layer, x = net("nf4", lora_dropout=0.4).base_model.model.first, torch.randn(1, D_IN).expand(3000, D_IN).contiguous()
    with torch.no_grad():
        stock = layer(x)
        fuse(layer)
        ours = layer(x)
        layer.eval()
        layer(x)
    assert [call["dropout_p"] for call in calls] == [0.4, 0.0]
    torch.testing.assert_close(ours.mean(0), stock.mean(0), rtol=0, atol=0.1 * stock.std(0).max().item())
    torch.testing.assert_close(ours.std(0), stock.std(0), rtol=0.1, atol=0)


def test_a_weight_repacked_for_inference_has_no_gradient():
    model, x = net("nf4"), torch.randn(2, D_IN)
    fuse(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.packing_format_for_cpu = True  # what its forward does on CPUs with bfloat16
    with pytest.raises(RuntimeError, match="set support_avx512bf16_for_cpu to False"):
        model(x.requires_grad_())
    with pytest.raises(RuntimeError, match="set support_avx512bf16_for_cpu to False"):
        [*quantised.dequantised_rows(model.base_model.model.first.base_layer)]


def test_what_is_left_to_peft_is_reported(calls):
    dropped = net("nf4", use_dora=True, lora_dropout=0.1)
    assert [*fuse(dropped).skipped.values()] == [
        "dropout with DoRA takes a second product with the quantised weight"
    ] * 2
    kept = net("int8")
    kept.base_model.model.first.base_layer.state.has_fp16_weights = True
    assert [*fuse(kept).skipped.values()] == ["the 8-bit layer keeps its weight in 16 bits (has_fp16_weights)"]
    with pytest.raises(ValueError, match="has_fp16_weights"):
        fuse(kept, strict=True)
    dropped(torch.randn(2, D_IN))
    assert not calls


@every_scheme
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 22])
def test_rows_are_dequantised_in_chunks(scheme, chunk):
    from peft.utils.integrations import dequantize_module_weight

    for d_in in (D_IN, 96):  # in blocks of 64
        base = SCHEMES[scheme](nn.Linear(d_in, D_OUT).requires_grad_(False))
        rows = [*quantised.dequantised_rows(base, chunk)]
        assert torch.equal(torch.cat(rows), dequantize_module_weight(base))
        assert len(rows) > 1 or chunk > base.weight.numel() or d_in == 96


@each_library
def test_dora_s_norm_is_the_same_in_chunks(scheme, monkeypatch):
    layer = net(scheme, use_dora=True).base_model.model.first
    whole, rows = quantised.quantised_gain(layer, "default"), quantised.dequantised_rows
    monkeypatch.setattr(quantised, "dequantised_rows", lambda base: rows(base, 7 * D_IN))
    torch.testing.assert_close(quantised.quantised_gain(layer, "default"), whole, rtol=1e-6, atol=0)


def quantised_llama(scheme="nf4", dora=False):
    """A tiny Llama as QLoRA trains it: 4-bit linears, float32 norms and adapters, checkpointed blocks."""
    torch.manual_seed(1)
    base = base_model(dtype=torch.float32).requires_grad_(False)
    for name, module in list(base.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and leaf != "lm_head":
            setattr(base.get_submodule(parent), leaf, SCHEMES[scheme](module))
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = "4" in scheme, scheme == "int8"
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    return randomise(get_peft_model(base, LoraConfig(r=4, use_dora=dora, target_modules=TARGETS)))


def train(scheme, dora, backend, autocast=False, steps=4):
    """The losses of some steps of Echo-LoRA, by PEFT itself for the backend "peft"."""
    model = quantised_llama(scheme, dora)
    if backend != "peft":
        assert fuse(model, backend=backend, strict=True).grouped == ()
    torch.manual_seed(2)
    echo = randomise(EchoLoRA(model, always_on(step_mode="auto", site="rank")).train())
    optimizer = torch.optim.SGD([p for p in echo.parameters() if p.requires_grad], lr=0.02)
    torch.manual_seed(3)
    data, losses = batch(), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = echo(**data)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        echo.advance()
        losses.append([output[name].item() for name in ("loss", "loss_off", "loss_on", "loss_kd")])
    return torch.tensor(losses)


@pytest.mark.parametrize("dora", [False, True])
@each_library
def test_qlora_with_an_echo_trains(scheme, dora, calls):
    # PEFT 0.21 cannot compute a second step of DoRA on int8 weights on CPUs: it loses their scales
    stock = train(scheme, dora, "reference" if dora and scheme == "int8" else "peft")
    calls.clear()
    ours = train(scheme, dora, None)
    assert len(calls) >= 2 * 4 * 6 * len(TARGETS)  # and in the recomputation
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert (ours[-1, :3] < ours[0, :3]).all() and (ours[:, 3] > 0).all()


def test_qlora_under_autocast(calls):
    exact, stock, ours = (train("nf4", False, *way) for way in (("peft",), ("peft", True), (None, True)))
    assert len(calls) >= 2 * 4 * 6 * len(TARGETS)
    for losses in (stock, ours):
        torch.testing.assert_close(losses, exact, rtol=0.02, atol=0.02)
    assert (ours[-1, :3] < ours[0, :3]).all()


def test_compiled():
    """Whatever the library's own layer breaks the graph into."""
    model, x = net("nf4"), torch.randn(2, 3, D_IN)
    wanted = results(model, x)
    fuse(model)
    got = results(torch.compile(model, backend="aot_eager"), x)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, wanted)
