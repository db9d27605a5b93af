"""A fused PEFT model against the same model as PEFT computes it."""

import copy
import pickle

import pytest
import torch
from fuse_cases import assert_same, config, every_kind, lora_or_dora, moved, narrow_dtypes, net, results, unfused
from linear_cases import error_ratios
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from transformers.pytorch_utils import Conv1D

from echolora_kernels import BackendUnavailable, FuseReport, fuse, unfuse


@every_kind
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_outputs_and_gradients_are_those_of_peft(kind, bias, backend, calls):
    model, x = net(kind, bias=bias), torch.randn(3, 7, 12).double()
    wanted, state = results(model, x), model.state_dict()
    assert len(wanted) >= 2 + 2 * (2 + (kind == "dora") + (kind == "lora_bias"))
    report = fuse(model, backend=backend, strict=True)
    assert report.fused == ("base_model.model.first", "base_model.model.second") and not report.skipped
    assert_same(results(model, x), wanted)
    assert len(calls) == 2 and all(call["backend"] == backend for call in calls)
    assert [*model.state_dict()] == [*state] and [n for n, _ in model.named_modules()] == [
        n for n, _ in unfused(model).named_modules()
    ]
    assert_same(results(model.eval(), x[0]), results(unfused(model), x[0]))


def second_adapter(model, kind="lora"):
    model.add_adapter("other", config(kind, r=2))
    moved(model)


def replace_forward(model):
    base = model.base_model.model.first.base_layer
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)


def both(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def set_other(model):
    second_adapter(model)
    model.set_adapter("other")


def delete_default(model):
    set_other(model)
    model.delete_adapter("default")


def delete_all(model):
    for module in (model.base_model.model.first, model.base_model.model.second):
        module.delete_adapter("default")


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def hook_on(part):
    def change(model):
        layer = model.base_model.model.first
        module = {"layer": layer, "base": layer.base_layer, "A": layer.lora_A["default"]}[part]
        module.register_forward_hook(lambda module, args, output: 3 * output)

    return change


def unfreeze(model):
    model.base_model.model.first.base_layer.weight.requires_grad_(True)


def other_dropout(model):
    model.base_model.model.first.lora_dropout["default"] = nn.AlphaDropout(0.0)


# what happens to a model after it was fused -> how many of its two layers our operator then computes
CHANGES = {
    "nothing": (lambda model: None, 2),
    "a second adapter": (second_adapter, 2),
    "set_adapter": (set_other, 2),
    "an adapter of another kind": (lambda model: (second_adapter(model, "rslora"), model.set_adapter("other")), 2),
    "two active adapters": (both, 0),
    "delete_adapter": (delete_default, 2),
    "no adapter left": (delete_all, 0),
    "merged": (lambda model: model.merge_adapter(), 0),
    "merged and unmerged": (merge_and_back, 2),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "merged and disabled": (lambda m: (m.merge_adapter(), m.base_model.disable_adapter_layers()), 0),
    "a hook on the layer": (hook_on("layer"), 2),
    "a hook on the base layer": (hook_on("base"), 1),
    "a hook on A": (hook_on("A"), 1),
    "a replaced forward": (replace_forward, 1),
    "an unfrozen weight": (unfreeze, 2),
    "scaled": (lambda model: model.base_model.model.first.scale_layer(0.5), 2),
    "another kind of dropout": (other_dropout, 1),
    "prepared for swapped adapters": (prepare_model_for_compiled_hotswap, 0),
}


@pytest.mark.parametrize("change", CHANGES)
@lora_or_dora
def test_what_happens_to_the_model_afterwards(kind, change, calls):
    model, x = net(kind), torch.randn(3, 7, 12).double()
    changed, used = CHANGES[change]
    stock = copy.deepcopy(model)
    fuse(model)
    for one in (model, stock):
        torch.manual_seed(5)
        changed(one)
    wanted = results(stock, x)
    assert_same(results(model, x), wanted, 1e-11)
    assert len(calls) == used, [call.keys() for call in calls]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_stay_with_peft(layout, calls):
    model = net()
    x = torch.nested.nested_tensor([torch.randn(3, 12).double(), torch.randn(2, 12).double()], layout=layout)
    wanted = model(x)
    fuse(model)
    for got, want in zip(model(x).unbind(), wanted.unbind(), strict=True):
        assert torch.equal(got, want)
    assert not calls


def test_disable_adapter_and_back(calls):
    model, x = net(), torch.randn(2, 3, 12).double()
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), unfused(model)(x), rtol=1e-12, atol=1e-12)
        assert not calls
    assert not torch.allclose(model(x), model.get_base_model().head(x))
    assert len(calls) == 2


def test_adapters_mixed_in_a_batch(calls):
    model, x = net(), torch.randn(3, 4, 12).double()
    fuse(model)
    second_adapter(model)
    model.eval()
    names = ["other", "__base__", "default"]
    torch.testing.assert_close(
        model(x, adapter_names=names), unfused(model)(x, adapter_names=names), rtol=1e-12, atol=1e-12
    )
    assert not calls
    model(x)
    assert len(calls) == 2  # and the next call is ours again


def test_modules_to_save_and_merging_for_good(calls):
    model, x = net(modules_to_save=["head"]), torch.randn(2, 3, 12).double()
    wanted = results(model, x)
    assert any("modules_to_save" in name for name in wanted)
    fuse(model)
    assert_same(results(model, x), wanted)
    assert len(calls) == 2
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), wanted["y"], rtol=1e-12, atol=1e-12)


def test_an_adapter_on_new_modules_waits_for_the_next_fuse(calls):
    model, x = net(), torch.randn(2, 3, 12).double()
    fuse(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["head"]))
    moved(model).base_model.set_adapter("other")
    wanted = results(model, x)
    assert not calls
    assert "base_model.model.head" in fuse(model).fused
    assert_same(results(model, x), wanted)
    assert len(calls) == 1


@lora_or_dora
@narrow_dtypes
def test_narrow_dtypes_are_as_near_to_float64_as_peft(dtype, adapter_dtype, autocast, kind, calls):
    """One adapted linear: the largest and the rms error are at most 1.5 times PEFT's."""
    model = net(kind, dtype, adapter_dtype, (320, 256), r=16)
    layer, x = model.base_model.model.first, torch.randn(8, 96, 320).to(dtype)

    def run(one, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and x.dtype != torch.float64):
            return results(one, x)

    exact = run(copy.deepcopy(layer).double(), x.double())
    peft = run(layer, x)
    fuse(model)
    ours = run(layer, x)
    assert len(calls) == 1 and {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in peft.items()}
    ratios = error_ratios(ours, peft, exact)
    assert max(max(pair) for pair in ratios.values()) <= 1.5, ratios


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "options"),
    [
        (torch.float32, torch.bfloat16, {}),
        (torch.bfloat16, torch.float16, {}),
        (torch.bfloat16, torch.float32, {"kind": "lora_bias"}),
    ],
    ids=["narrower", "neither", "lora_bias"],
)
def test_dtypes_that_stay_with_peft(dtype, adapter_dtype, options, calls):
    model, x = net(dtype=dtype, adapter_dtype=adapter_dtype, **options), torch.randn(2, 3, 12).to(dtype)
    wanted = results(model, x)
    fuse(model)
    assert_same(results(model, x), wanted, 0)
    assert not calls


def test_without_peft_s_cast_it_fails_as_peft_does(calls):
    model, x = net(dtype=torch.bfloat16, adapter_dtype=torch.float32), torch.randn(2, 3, 12).bfloat16()
    fuse(model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert not calls


@pytest.mark.parametrize("training", [True, False])
@lora_or_dora
def test_dropout_has_the_same_statistics(kind, training, calls):
    """Over many draws the mean and the spread of the output are PEFT's; none in eval mode."""
    model = net(kind, dropout=0.4).train(training)
    layer, x = model.base_model.model.first, torch.randn(1, 12).double()
    x = x.expand(4000, 12).contiguous()  # independent draws in one call
    with torch.no_grad():
        stock = layer(x)
        fuse(model)
        ours = layer(x)
    assert calls[0]["dropout_p"] == (0.4 if training else 0.0)
    if not training:
        return torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    assert (stock.std(0) > 0.05).all() and not torch.equal(ours, layer(x))
    torch.testing.assert_close(ours.mean(0), stock.mean(0), rtol=0, atol=0.1 * stock.std(0).max().item())
    torch.testing.assert_close(ours.std(0), stock.std(0), rtol=0.08, atol=0)


@pytest.mark.parametrize("way", ["forward mode", "jit", "vmap"])
def test_what_kernels_cannot_be_seen_through_by(way):
    model, x = net(), torch.randn(2, 3, 12).double()
    results_ = []
    for prepare in (lambda model: None, fuse):
        prepare(model)
        if way == "jit":
            results_.append(torch.jit.trace(model, (x,), check_trace=False)(2 * x))
        elif way == "vmap":
            results_.append(torch.func.vmap(model)(x))
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                results_.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    torch.testing.assert_close(*results_, rtol=1e-12, atol=1e-12)


def test_fuse_twice_and_unfuse():
    model = net()
    before = [dict(module.__dict__) for module in model.modules()]
    first = fuse(model)
    with pytest.raises(BackendUnavailable):
        fuse(model, backend="cuda" if not torch.cuda.is_available() else "none")
    assert fuse(model, backend="reference") == first
    layer = model.base_model.model.first
    assert layer.__dict__["forward"].backend == "reference"
    unfuse(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    unfuse(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_by_itself(copied, calls):
    model, x = net("dora"), torch.randn(2, 3, 12).double()
    fuse(model)
    other = copied(model)
    wanted = other(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.clear()
    assert torch.equal(other(x), wanted) and len(calls) == 2
    unfuse(model)
    assert torch.equal(other(x), wanted) and len(calls) == 4


class Odd(nn.Module):
    """What PEFT adapts beside plain linears."""

    def __init__(self):
        super().__init__()
        self.linear, self.wide = nn.Linear(4, 4), nn.Linear(300, 300)
        self.transposed, self.embedding, self.conv = Conv1D(4, 4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.quantised, self.accelerated, self.patched = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def test_the_report_names_what_was_skipped_and_strict_refuses():
    names = [name for name, _ in Odd().named_children()]
    model = get_peft_model(Odd(), LoraConfig(r=2, target_modules=names, rank_pattern={"wide": 257}))
    inside = model.base_model.model
    inside.quantised.base_layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    inside.accelerated.base_layer.register_forward_pre_hook(lambda module, args: None)
    inside.patched.forward = inside.linear.forward
    with pytest.raises(ValueError, match="strict") as refused:
        fuse(model, strict=True)
    assert "forward" not in inside.linear.__dict__
    report = fuse(model)
    assert isinstance(report, FuseReport) and report.fused == ("base_model.model.linear",)
    skipped = {name.removeprefix("base_model.model."): reason for name, reason in report.skipped.items()}
    wanted = {
        "transposed": "Conv1D", "embedding": "Embedding", "conv": "Conv2d", "attention": "MultiheadAttention",
        "attention.base_layer.out_proj": "MultiheadAttention", "quantised": "int8", "accelerated": "hooks",
        "wide (default)": "257", "patched": "replaced",
    }  # fmt: skip
    assert skipped.keys() == wanted.keys()
    for name, word in wanted.items():
        assert word in skipped[name] and skipped[name] in str(report) and skipped[name] in str(refused.value)
    assert str(report).splitlines()[1].split() == ["fused", "1", "base_model.model.linear"]


def test_an_unsupported_variant_is_skipped_and_stays_right(calls):
    model, x = net(dtype=torch.float32), torch.randn(2, 3, 12)
    model.add_adapter("mica", config(r=2, init_lora_weights="mica"))
    report = fuse(moved(model))
    assert len(report.fused) == 2 and len(report.skipped) == 2
    assert all("(mica)" in name and "MiCALinearVariant" in why for name, why in report.skipped.items())
    model.set_adapter("mica")
    assert_same(results(model, x), results(unfused(model), x))
    assert not calls


def test_what_fuse_refuses():
    with pytest.raises(TypeError, match=r"^model: got int, wants a torch\.nn\.Module"):
        fuse(3)
    with pytest.raises(ValueError, match=r"^model: got no LoRA layer of PEFT"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^backend: got 'fast'"):
        fuse(net(), backend="fast")
