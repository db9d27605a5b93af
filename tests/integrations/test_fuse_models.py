"""Fused models as a whole: checkpointing, the echo, torch.compile, saved adapters."""

import copy

import pytest
import torch
from fuse_cases import assert_same, lora_or_dora, net, results
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import TARGETS, always_on, base_model, batch, echo_model, gradients, peft_model, randomise

from echolora_kernels import EchoLoRA, fuse


@pytest.mark.parametrize("use_reentrant", [False, True])
@lora_or_dora
def test_gradient_checkpointing(kind, use_reentrant, calls):
    model = peft_model(dora=kind == "dora").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def step():
        model.zero_grad()
        output = model(**batch_, use_cache=False)
        output.loss.backward()
        return {"loss": output.loss.detach(), **gradients(model)}

    batch_ = batch()
    wanted = step()
    fuse(model)
    assert_same(step(), wanted, 1e-10)
    assert len(calls) == 2 * 6 * len(TARGETS)  # and in the recomputation


@lora_or_dora
@pytest.mark.parametrize("form", ["two-pass", "shared", "packed"])
@pytest.mark.parametrize("fused_first", [False, True])
def test_an_echo_on_a_fused_model(kind, form, fused_first, calls):
    wrapped = echo_model("peft", always_on(step_mode=form), dora=kind == "dora")
    data = batch()

    def step(model):
        model.zero_grad()
        losses = {name: value for name, value in model(**data).items() if name.startswith("loss")}
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()} | gradients(model)

    wanted = step(wrapped)
    assert wanted["loss_kd"] > 0 and any(name.startswith("echo_networks") and g.any() for name, g in wanted.items())
    if fused_first:
        networks = wrapped.echo_networks.state_dict()
        fuse(wrapped.remove())
        wrapped = EchoLoRA(wrapped.model, wrapped.echo_config).train()
        wrapped.echo_networks.load_state_dict(networks)
    else:
        fuse(wrapped)
    assert_same(step(wrapped), wanted, 1e-9)
    assert len(calls) >= 2 * 6 * len(TARGETS)


@lora_or_dora
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])
def test_compiled(kind, whole):
    model, x = net(kind), torch.randn(2, 3, 12).double()
    wanted = results(model, x)
    fuse(model)
    if whole:
        compiled = torch.compile(model)
        assert_same({n.removeprefix("_orig_mod."): g for n, g in results(compiled, x).items()}, wanted)
        return
    layer = model.base_model.model.first
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_the_saved_adapter_is_byte_for_byte_peft_s(tmp_path):
    torch.manual_seed(0)
    base = base_model(dtype=torch.float32)
    options = LoraConfig(r=3, target_modules=TARGETS, use_dora=True)
    model = randomise(get_peft_model(copy.deepcopy(base), options)).eval()
    model.save_pretrained(str(tmp_path / "stock"))
    fuse(model, strict=True)
    model.save_pretrained(str(tmp_path / "fused"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    loaded, data = PeftModel.from_pretrained(base, str(tmp_path / "fused")).eval(), batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, loaded(**data).logits, rtol=1e-4, atol=1e-4)
        fuse(loaded)
        assert torch.equal(model(**data).logits, loaded(**data).logits)


def test_blocks_share_a_line_of_the_table():
    report = fuse(peft_model())
    lines = str(report).splitlines()
    assert len(report.fused) == 6 * len(TARGETS) and len(report.grouped) == 6 and len(lines) == 2 + len(TARGETS)
    assert lines[1].split()[:2] == ["fused", "6"] and "layers.*.self_attn.q_proj" in lines[1]
    assert lines[-1].split()[:2] == ["grouped", "6"] and "layers.*.self_attn.(q_proj, k_proj, v_proj)" in lines[-1]
