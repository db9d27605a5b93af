"""Fused layers that share their input: computed together, and never with other numbers than PEFT's."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fuse_cases import KINDS, assert_same, lora_or_dora, moved, narrow_dtypes, results, unfused
from linear_cases import error_ratios
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from echolora_kernels import fuse, unfuse
from echolora_kernels.integrations import grouped

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self, d_in=12, d_out=8):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(d_in, 2 * d_out), nn.Linear(d_in, d_out, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d_in, d_out), nn.Linear(d_out, d_in)

    def between(self, x):
        """What a test has happen between two projections."""

    after = between

    def forward(self, x):
        q = self.q_proj(x)
        self.between(x)
        k = self.k_proj(x)
        self.after(x)
        v = self.v_proj(x)
        return self.o_proj(torch.tanh(q[..., : k.shape[-1]] * k + q[..., k.shape[-1] :]) * v)


class SideBySide(Attention):
    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class WithoutValue(Attention):
    def forward(self, x):
        q, k, _ = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q[..., : k.shape[-1]] * k)


class Net(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(torch.sin(x))


def net(kind="lora", dtype=torch.float64, adapter_dtype=None, *, attention=Attention, r=3, **options):
    """A PeftModel of `Net` in training mode, whose adapters have different ranks and do something."""
    sizes = {name: options.pop(name) for name in ("d_in", "d_out") if name in options}
    options = {"target_modules": PROJECTIONS, "rank_pattern": {"v_proj": r + 2}, **KINDS[kind], **options}
    model = get_peft_model(Net(attention(**sizes)), LoraConfig(r=r, lora_alpha=2 * r, **options)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter_dtype is not None:
            parameter.data = parameter.data.to(adapter_dtype)
    return moved(model).train()


def attention_of(model):
    return model.base_model.model.attention


def data():
    return torch.randn(3, 5, 12).double()


def insides(model):
    return [{name: copy.copy(value) for name, value in vars(module).items()} for module in model.modules()]


def sizes(groups):
    return [len(projections) for projections in groups]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora_bias"])
def test_outputs_and_gradients_are_those_of_peft(kind, backend, groups):
    model, x = net(kind), data()
    wanted = results(model, x)
    state, before = [*model.state_dict()], insides(model)
    report = fuse(model, backend=backend, strict=True)
    assert report.grouped == (tuple(f"base_model.model.attention.{name}" for name in PROJECTIONS),)
    assert report.fused == report.grouped[0] and not report.skipped
    assert str(report).splitlines()[-1].split(maxsplit=2) == [
        "grouped", "1", "base_model.model.attention.(q_proj, k_proj, v_proj)",
    ]  # fmt: skip
    assert fuse(model, backend=backend) == report and len(attention_of(model)._forward_hooks) == 1
    assert_same(results(model, x), wanted)
    assert_same(results(model.eval(), x[0]), results(unfused(model), x[0]))
    assert sizes(groups) == [3, 3]
    assert [*model.state_dict()] == state
    unfuse(model.train())
    assert insides(model) == before


@lora_or_dora
@narrow_dtypes
def test_narrow_dtypes_are_as_near_to_float64_as_peft(dtype, adapter_dtype, autocast, kind, groups):
    """The largest and the rms error of every output and gradient are at most 1.5 times PEFT's."""
    model = net(kind, dtype, adapter_dtype, attention=SideBySide, r=16, d_in=320, d_out=128)
    layer, x = attention_of(model), torch.randn(8, 96, 320).to(dtype)

    def run(one, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and x.dtype != torch.float64):
            return results(one, x)

    exact = run(copy.deepcopy(layer).double(), x.double())
    peft = run(layer, x)
    fuse(model)
    ours = run(layer, x)
    assert sizes(groups) == [3] and {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in peft.items()}
    ratios = error_ratios(ours, peft, exact)
    assert max(max(pair) for pair in ratios.values()) <= 1.5, ratios


@pytest.mark.parametrize(
    ("targets", "expected"), [(["q_proj", "v_proj"], 2), (["q_proj", "o_proj"], 0), ([*PROJECTIONS, "o_proj"], 3)]
)
def test_only_some_adapted(targets, expected, groups):
    model, x = net(target_modules=targets), data()
    wanted = results(model, x)
    assert len(fuse(model, strict=True).grouped) == (expected > 0)
    assert_same(results(model, x), wanted)
    assert sizes(groups) == ([expected] if expected else [])


def second_adapter(attention):
    for name in PROJECTIONS:
        layer = getattr(attention, name)
        layer.update_layer("other", 2, 4, config=LoraConfig(r=2))
        moved(layer).double()


def both(attention):
    second_adapter(attention)
    for name in PROJECTIONS:
        getattr(attention, name).set_adapter(["default", "other"])


def set_other(attention):
    second_adapter(attention)
    for name in PROJECTIONS:
        getattr(attention, name).set_adapter("other")


def during(action):
    """`action` between the first and the second projection."""
    return lambda attention: setattr(attention, "between", partial(action, attention.k_proj))


def replaced_values(k, x):
    k.lora_A["default"].weight.data = 2 * k.lora_A["default"].weight.data


def grad_mode_off(attention):
    attention.between = lambda x: torch.set_grad_enabled(False)
    attention.after = lambda x: torch.set_grad_enabled(True)


# what happens to a fused model -> the layers of each group that is then computed, and how many layers alone
CHANGES = {
    "nothing": (lambda attention: None, [3], 0),
    "a hook before k": (lambda a: a.k_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],)), [2], 1),
    "a hook before the first": (lambda a: a.q_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],)), [], 3),
    "a hook on the gradient of v": (lambda a: a.v_proj.register_full_backward_hook(lambda *_: None), [2], 1),
    "a hook after k": (lambda a: a.k_proj.register_forward_hook(lambda m, args, y: y.mul_(3)), [3], 0),
    "a hook on k's base layer": (
        lambda a: a.k_proj.base_layer.register_forward_hook(lambda m, args, y: 2 * y), [2], 0,
    ),
    "disabled": (lambda a: [getattr(a, name).enable_adapters(False) for name in PROJECTIONS], [], 0),
    "merged": (lambda a: [getattr(a, name).merge() for name in PROJECTIONS], [], 0),
    "one merged": (lambda a: a.v_proj.merge(), [2], 0),
    "two active adapters": (both, [], 0),
    "set_adapter": (set_other, [3], 0),
    "one adapter deleted": (lambda a: a.k_proj.delete_adapter("default"), [2], 0),
    "a frozen adapter": (lambda a: a.k_proj.requires_grad_(False), [3], 0),
    "an unfrozen weight": (lambda a: a.k_proj.base_layer.weight.requires_grad_(True), [3], 0),
    "scaled": (lambda a: a.k_proj.scale_layer(0.5), [3], 0),
    "a forward of its own": (lambda a: setattr(a, "forward", partial(Attention.forward, a)), [3], 0),
    "disabled meanwhile": (during(lambda k, x: k.enable_adapters(False)), [3], 0),
    "scaled meanwhile": (during(lambda k, x: k.scaling.update(default=3.0)), [3], 1),
    "other values meanwhile": (during(replaced_values), [3], 1),
    "frozen meanwhile": (during(lambda k, x: k.requires_grad_(False)), [3], 1),
    "no gradients meanwhile": (grad_mode_off, [3], 1),
    "copied meanwhile": (lambda a: setattr(a, "between", lambda x: copy.deepcopy(a)), [3], 0),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@lora_or_dora
def test_what_happens_to_the_model_afterwards(kind, change, groups, calls):
    model, x = net(kind), data()
    changed, together, alone = CHANGES[change]
    stock = copy.deepcopy(model)
    fuse(model)
    for one in (model, stock):
        torch.manual_seed(5)
        changed(attention_of(one))
    wanted = results(stock, x)
    assert_same(results(model, x), wanted, 1e-11)
    assert sizes(groups) == together and len(calls) - sum(together) == alone


@pytest.mark.parametrize(
    "change",
    [
        during(lambda k, x: x.mul_(2)),
        during(lambda k, x: setattr(x, "data", 2 * x)),
        during(torch.no_grad()(lambda k, x: k.lora_B["default"].weight.mul_(2))),
    ],
    ids=["x", "x's data", "B"],
)
def test_what_is_changed_in_place_meanwhile_is_noticed(change, groups):
    model, x = net(), data()
    stock = copy.deepcopy(model)
    fuse(model)
    for one in (model, stock):
        change(attention_of(one))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)
    assert sizes(groups) == [3]


def test_other_autocast_meanwhile(groups, calls):
    model, x = net(dtype=torch.float32), torch.randn(3, 5, 12)
    stock = copy.deepcopy(model)
    fuse(model)
    for one in (model, stock):
        attention_of(one).between = lambda x: torch.set_autocast_enabled("cpu", True)
        attention_of(one).after = lambda x: torch.set_autocast_enabled("cpu", False)
    torch.testing.assert_close(model(x), stock(x), rtol=0.1, atol=2e-3)  # bfloat16's
    assert sizes(groups) == [3] and len(calls) == 4


@lora_or_dora
def test_an_output_that_nothing_depends_on_has_no_gradients(kind, groups):
    model, x = net(kind, attention=WithoutValue), data()
    wanted = results(model, x)
    assert not any("v_proj" in name for name in wanted)
    fuse(model)
    assert_same(results(model, x), wanted)
    assert sizes(groups) == [3]


@pytest.mark.parametrize("training", [True, False])
def test_under_dropout_every_projection_drops_elements_of_its_own(training, groups, calls):
    """So that q and k are as independent as in PEFT: the mean of their product is the same."""
    model = net(lora_dropout=0.3).train(training)
    fuse(model)
    model(data())
    assert sizes(groups) == ([] if training else [3]) and len(calls) == 3


def test_adapters_mixed_in_a_batch(groups):
    model, x = net().eval(), data()
    fuse(model)
    set_other(attention_of(model))
    names = ["other", "__base__", "default"]
    torch.testing.assert_close(
        model(x, adapter_names=names), unfused(model)(x, adapter_names=names), rtol=1e-12, atol=1e-12
    )
    assert not groups
    model(x)
    assert sizes(groups) == [3]


def test_outside_their_parent_s_forward_they_are_alone(groups):
    attention, x = attention_of(model := net()), data()
    fuse(model)
    for _ in range(2):
        attention.q_proj(x), attention.k_proj(x), attention.forward(x)
    assert not groups


def test_nothing_is_held_after_an_error(monkeypatch, groups):
    model, x = net(), data()
    fuse(model)
    computed, operator = [], grouped.echo_lora_linear_group

    def watched(x, projections, **named):
        ys = operator(x, projections, **named)
        computed.extend(map(weakref.ref, ys))
        return ys

    monkeypatch.setattr(grouped, "echo_lora_linear_group", watched)
    attention_of(model).between = lambda x: 1 / 0
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError):
            model(x)
        gc.collect()
        assert len(computed) == 3 and all(y() is None for y in computed)
        computed.clear()
    attention_of(model).q_proj(x)
    assert not computed


def test_threads_do_not_see_each_other(groups, calls):
    model = net().eval()
    xs = [data(), data()]
    wanted = [model(x) for x in xs]
    fuse(model)
    together = threading.Barrier(2)
    attention_of(model).between = attention_of(model).after = lambda x: together.wait(10)
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: model(xs[n])})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        torch.testing.assert_close(found[n], wanted[n], rtol=1e-12, atol=1e-12)
    assert sizes(groups) == [3, 3] and len(calls) == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_groups_of_its_own(copied, groups):
    model, x = net(), data()
    fuse(model)
    other = copied(model)
    wanted = other(x)
    unfuse(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(x), wanted) and sizes(groups) == [3, 3]
    unfuse(other)
    assert not attention_of(other)._forward_hooks and not attention_of(other)._forward_pre_hooks


def test_merging_for_good(groups):
    model, x = net(), data()
    wanted = model(x)
    fuse(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-12, atol=1e-12)
    unfuse(merged)
    assert not groups and not merged.attention._forward_hooks and not merged.attention._forward_pre_hooks


@pytest.mark.parametrize(
    "way", ["compile", "vmap", "no_grad", "inference mode", "few rows", "global hook", "lora_bias"]
)
def test_where_they_are_computed_alone(way, groups, monkeypatch):
    model, x = net("lora_bias" if way == "lora_bias" else "lora", target_modules=["q_proj", "v_proj"]), data()
    wanted = model(x).detach()
    fuse(model)
    if way == "few rows":
        monkeypatch.setattr(grouped, "MIN_ROWS", 16)
    with {"no_grad": torch.no_grad, "inference mode": torch.inference_mode}.get(way, contextlib.nullcontext)():
        if way == "compile":
            got = torch.compile(model, fullgraph=True, backend="eager")(x)
        elif way == "vmap":
            got = torch.func.vmap(model)(x)
        elif way == "global hook":
            handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
            got = model(x)
            handle.remove()
        else:
            got = model(x + 0)
    torch.testing.assert_close(got.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert not groups


@pytest.mark.parametrize("sharded", ["k_proj", "attention"])
def test_shards_are_whole_in_the_forward_of_what_is_sharded(sharded, tmp_path, groups, calls):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, x = net(), data()
        wanted = results(model, x)
        fuse(model)
        fully_shard(getattr(attention_of(model), sharded, attention_of(model)))
        got = results(model, x)
        got = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in got.items()}
    finally:
        dist.destroy_process_group()
    assert_same(got, wanted)
    assert sizes(groups) == ([3] if sharded == "attention" else [2]) and len(calls) == 3
