"""No sample's loss depends on its padding, its company, or the library that made the adapter."""

import pytest
import torch
from tiny import FAMILIES, MAKERS, always_on, echo_model, gradients, pad, sample

from echolora_kernels import EchoLoRA

# transformers computes norms, rotary angles and the eager softmax in float32 whatever the weights are
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def spans(*lengths):
    """A sample of alternating unsupervised and supervised stretches."""
    ids, labels = [], []
    for index, length in enumerate(lengths):
        stretch, _ = sample(length, 0)
        ids += stretch
        labels += stretch if index % 2 else [-100] * length
    return ids, labels


SAMPLES = {"single-span": lambda: [sample(5, 3), sample(9, 1), sample(2, 6)],
           "multi-span": lambda: [spans(4, 2, 3, 2), spans(6, 1), spans(2, 1, 1, 3, 2)]}  # fmt: skip


def weighted(wrapped, samples, **padding):
    """Loss of each sample alone in its batch, as sums over tokens."""
    return [wrapped(**pad([one], **padding), num_items_in_batch=1) for one in samples]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spans", SAMPLES)
def test_padding_and_company_change_nothing(family, spans):
    wrapped = echo_model(family=family)
    samples = SAMPLES[spans]()
    alone = weighted(wrapped, samples)
    assert sum(output.loss_on != output.loss_off for output in alone) >= 2  # one answer token alone sees no echo
    for side in ("left", "right"):
        together = wrapped(**pad(samples, side, length=17), num_items_in_batch=1)
        for name in ("loss", "loss_off", "loss_on", "loss_kd"):
            torch.testing.assert_close(together[name], sum(output[name] for output in alone), **CLOSE)


def test_gradients_do_not_depend_on_padding():
    wrapped, samples = echo_model(), SAMPLES["multi-span"]()
    found = []
    for side in ("left", "right"):
        wrapped.zero_grad()
        wrapped(**pad(samples, side, length=15)).loss.backward()
        found.append(gradients(wrapped))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(
            grad, found[1][name], rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-9, msg=name
        )


@pytest.mark.parametrize("site", ["output", "adapter_input", "rank"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_layers_and_native_layers_agree(site, dora):
    """Two ways of bringing the echo in (behind the layer, inside the operator), one result and one gradient."""
    peft, native = (EchoLoRA(MAKERS[kind](dora=dora), always_on(site=site)).train() for kind in ("peft", "native"))
    theirs = {_plain(name): parameter for name, parameter in peft.named_parameters()}
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            if name.startswith("echo_networks"):
                parameter.normal_(0, 0.3)
            theirs[_plain(name)].copy_(parameter)
    inputs = pad(SAMPLES["multi-span"](), "left")
    outputs = [model(**inputs) for model in (peft, native)]
    for name in ("loss", "loss_off", "loss_on", "loss_kd"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-6, atol=1e-9)
    for output in outputs:
        output.loss.backward()
    compared = 0
    for name, parameter in native.named_parameters():
        if parameter.grad is not None:
            grad = theirs[_plain(name)].grad
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)
            compared += 1
    assert compared == 6 * 5 * (3 if dora else 2) + 5


def _plain(name):
    """One name for a parameter in both kinds of model."""
    for theirs, plain in (
        ("base_model.model.", ""), (".base_layer", ""), (".default", ""),
        ("lora_magnitude_vector.weight", "magnitude"), ("lora_A.weight", "lora_A"), ("lora_B.weight", "lora_B"),
    ):  # fmt: skip
        name = name.replace(theirs, plain)
    return name


def test_every_family_trains_and_gives_the_plain_model_back():
    for family in FAMILIES:
        wrapped = echo_model(family=family)
        before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            wrapped(**pad(SAMPLES["single-span"]())).loss.backward()
            optimizer.step()
        moved = [name for name, p in wrapped.named_parameters() if name in before and not torch.equal(p, before[name])]
        assert sorted(moved) == sorted(before), family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast(dtype):
    """Frozen weights in either dtype, float32 adapters and echo networks, under bfloat16 autocast."""
    wrapped = echo_model(dtype=torch.float32)
    samples = SAMPLES["single-span"]()
    exact = wrapped(**pad(samples))
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = wrapped(**pad(samples))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    for name in ("loss_off", "loss_on"):
        torch.testing.assert_close(output[name], exact[name], rtol=0.05, atol=0.05)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
