"""The wrapper: what it refuses, what it counts, what it hands back."""

import warnings

import pytest
import torch
from tiny import always_on, base_model, batch, echo_model, gradients, pad, peft_model, randomise, sample
from torch import nn

from echolora_kernels import EchoConfig, EchoLoRA, EchoLoRALinear
from echolora_kernels.method.collect import boundaries


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_networks_are_keyed_by_the_module_they_inject_into():
    wrapped = echo_model(
        config=always_on(source_layers=(4,), target_layers=(1, 2), target_modules=("q_proj", "up_proj"))
    )
    (networks,) = wrapped.echo_networks
    assert list(networks.out_features) == [
        f"base_model.model.model.layers.{layer}.{leaf}"
        for layer in (1, 2)
        for leaf in ("self_attn.q_proj", "mlp.up_proj")
    ]
    for name, width in networks.out_features.items():
        assert width == wrapped.model.get_submodule(name).out_features


def test_adapters_of_two_dtypes_have_networks_of_two_dtypes():
    model = peft_model(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "layers.1" in name and "up_proj.lora" in name:
            parameter.data = parameter.data.double()
    wrapped = EchoLoRA(model, always_on(source_layers=(4,), target_layers=(0, 1), target_modules=("up_proj",))).train()
    assert [(networks.down.dtype, list(networks.out_features)) for networks in wrapped.echo_networks] == [
        (dtype, [f"base_model.model.model.layers.{layer}.mlp.up_proj"])
        for layer, dtype in enumerate((torch.float32, torch.float64))
    ]
    wrapped(**batch()).loss.backward()
    assert all(networks.proj_up.grad.any() for networks in wrapped.echo_networks)


@pytest.mark.parametrize(("make", "config", "words"), [
    (base_model, {}, ["model", "no adapted linear"]),
    (peft_model, {"target_modules": ["o_proj"]}, ["target_modules", "o_proj", "q_proj"]),
    (peft_model, {"source_layers": [6], "target_layers": [0]}, ["source_layers", "6"]),
    (peft_model, {"source_layers": [2], "target_layers": [2]}, ["target_layers", "below 2"]),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_left_untouched(make, config, words):
    model = make()
    before = hooks(model)
    with pytest.raises(ValueError) as error:
        EchoLoRA(model, EchoConfig(**config))
    assert all(word in str(error.value) for word in words), error.value
    assert hooks(model) == before


def test_adapters_outside_the_target_layers_are_not_enough():
    model = base_model()
    attention = model.model.layers[5].self_attn
    attention.q_proj = EchoLoRALinear.from_linear(attention.q_proj)
    with pytest.raises(ValueError, match=r"target_layers.*layers\.5\.self_attn\.q_proj"):
        EchoLoRA(model, EchoConfig())


@pytest.mark.parametrize("arguments", [("model", EchoConfig()), (nn.Linear(1, 1), {"site": "output"})])
def test_wrong_types_are_refused(arguments):
    with pytest.raises(TypeError, match=r"(model|config): got"):
        EchoLoRA(*arguments)


def test_wrapping_twice_is_refused():
    with pytest.raises(TypeError, match=r"remove\(\)"):
        EchoLoRA(echo_model(), EchoConfig())


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"labels": None}, ValueError, ["labels", "None", "echo_off"]),
    ({"labels": torch.zeros(3, 4, dtype=torch.long)}, ValueError, ["labels", "(3, 4)", "(3, 10)"]),
    ({"labels": torch.zeros(3, 10)}, TypeError, ["labels", "float32", "int64"]),
    ({"attention_mask": torch.ones(3, 9)}, ValueError, ["attention_mask", "(3, 9)"]),
    ({"attention_mask": torch.ones(3, 10, device="meta")}, ValueError, ["attention_mask", "meta", "cpu"]),
    ({"input_ids": torch.zeros(3, 10)}, ValueError, ["input_ids"]),
    ({"input_ids": torch.zeros(10, dtype=torch.long)}, ValueError, ["input_ids", "(10,)"]),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(change, error, words):
    wrapped = echo_model()
    with pytest.raises(error) as caught:
        wrapped(**{**batch(), **change})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_without_a_prompt_is_refused(side):
    ids, labels = sample(0, 4)
    with pytest.raises(ValueError, match=r"labels.*samples \[1\]"):
        echo_model()(**pad([sample(5, 3), (ids, labels), sample(2, 2)], side))


def test_boundaries_are_the_last_prompt_positions():
    inputs = pad([sample(5, 3), sample(2, 1), (sample(4, 0)[0], [-100] * 4)], "left", length=9)
    b, supervised = boundaries(inputs["labels"], inputs["attention_mask"])
    assert b.tolist() == [5, 7, 0]
    assert supervised.tolist() == [True, True, False]


def test_samples_without_supervision_are_skipped_and_counted():
    wrapped = echo_model()
    kept, empty = [sample(5, 3), sample(3, 2)], (sample(6, 0)[0], [-100] * 6)
    expected = wrapped(**pad(kept))
    with pytest.warns(UserWarning, match="1 of 3 samples have no supervised token"):
        output = wrapped(**pad([kept[0], empty, kept[1]]))
    assert (expected.skipped_samples, output.skipped_samples) == (0, 1)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=2e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrapped(**pad([kept[0], empty])).skipped_samples == 1  # said once


def test_a_batch_without_supervision_has_loss_zero_and_still_backpropagates():
    wrapped = echo_model()
    empty = pad([(sample(6, 0)[0], [-100] * 6)] * 2)
    with pytest.warns(UserWarning, match="no supervised token in the whole batch"):
        output = wrapped(**empty)
    assert output.loss == 0 and output.skipped_samples == 2
    output.loss.backward()
    grads = gradients(wrapped)
    assert any("lora_A" in name for name in grads)
    assert all((grad == 0).all() for grad in grads.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(**empty)


def test_training_with_a_disabled_or_merged_adapter_is_refused():
    wrapped = echo_model()
    with wrapped.model.disable_adapter(), pytest.raises(RuntimeError, match="disabled"):
        wrapped(**batch())
    wrapped.model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged"):
        wrapped(**batch())
    wrapped.model.unmerge_adapter()
    wrapped(**batch())

    native = echo_model("native")
    native.model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(RuntimeError, match="merged"):
        native(**batch())


def test_advance_moves_the_schedule_and_the_state_dict_carries_it():
    config = EchoConfig(total_steps=10)
    wrapped = EchoLoRA(peft_model(), config)
    for _ in range(5):
        wrapped.advance()
    assert wrapped.step == 5 and wrapped.echo_probability == pytest.approx(0.6)
    other = EchoLoRA(peft_model(), config)
    other.load_state_dict(wrapped.state_dict())
    assert other.step == 5
    assert all(isinstance(value, torch.Tensor) for value in wrapped.state_dict().values())


def test_a_removed_wrapper_says_so():
    wrapped = echo_model()
    wrapped.remove()
    with pytest.raises(RuntimeError, match="removed"):
        wrapped(**batch())


def test_attributes_of_the_plain_model_are_at_hand():
    wrapped = echo_model()
    assert wrapped.config is wrapped.model.config
    wrapped.eval()
    assert wrapped.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape[1] > 3
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense


def test_generating_while_training_sees_no_echo():
    wrapped = echo_model()
    wrapped(**batch())
    prompt = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4, "do_sample": False}
    with_wrapper = wrapped.generate(**prompt)
    assert torch.equal(with_wrapper, wrapped.remove().generate(**prompt))


def test_the_output_is_a_dict_and_has_attributes():
    output = echo_model()(**batch())
    assert isinstance(output, dict) and output["loss"] is output.loss
    assert set(output) == {"loss", "loss_off", "loss_on", "loss_kd", "routed", "logits", "skipped_samples"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = output.nothing


def test_a_failing_forward_leaves_no_echo_behind():
    wrapped = echo_model()
    inputs = batch()
    calls = []

    def fail_in_the_on_pass(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = wrapped.model.base_model.model.model.layers[5].register_forward_hook(fail_in_the_on_pass)
    with pytest.raises(KeyboardInterrupt):
        wrapped(**inputs)
    handle.remove()
    with wrapped.echo_off():
        off = wrapped(**inputs).logits
    assert torch.equal(off, wrapped.remove()(**inputs).logits)


def test_an_echo_inside_the_magnitude_is_scaled_by_it():
    """With the gain taken out of the networks' last layer, inside becomes outside."""
    inputs, found = batch(), []
    for where in ("outside", "inside"):
        torch.manual_seed(3)
        wrapped = echo_model("native", always_on(dora_echo=where), dora=True)
        with torch.no_grad():
            for name, target in wrapped.targets.items():
                target.module.magnitude.mul_(1.5)
                if where == "inside":
                    proj_up = wrapped.echo_networks[0].network(name).proj_up
                    proj_up.div_(target.module.gain().unsqueeze(1))
        found.append(wrapped(**inputs).loss_on)
    torch.testing.assert_close(*found)


class PlainBlock(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.up, self.flatten = EchoLoRALinear(8, 8, r=2), flatten

    def forward(self, x):
        hidden = x.cumsum(dim=1).tanh()
        return x + (self.up(hidden.flatten(0, 1)).view_as(x) if self.flatten else self.up(hidden))


class PlainModel(nn.Module):
    """No transformers, no config: an embedding, a list of blocks, a head."""

    def __init__(self, flatten=False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.blocks = nn.ModuleList(PlainBlock(flatten) for _ in range(4))

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_plain_pytorch_model_works_too():
    wrapped = randomise(EchoLoRA(randomise(PlainModel()), always_on()).train())
    output = wrapped(**batch())
    output.loss.backward()
    assert output.loss_on != output.loss_off
    assert all(p.grad.abs().max() > 0 for p in wrapped.echo_networks.parameters())


def test_activations_that_are_not_samples_by_positions_are_refused_by_name():
    wrapped = EchoLoRA(PlainModel(flatten=True), always_on()).train()
    with pytest.raises(ValueError, match=r"blocks\.0\.up.*\(30, 8\).*target_modules"):
        wrapped(**batch())
