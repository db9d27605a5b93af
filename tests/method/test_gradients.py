"""The whole model's loss: derivatives against finite differences, and where gradient must not flow."""

import pytest
import torch
from tiny import always_on, batch, echo_model, gradients
from torch import nn

from echolora_kernels.method.collect import BoundaryStates


def float64_clean(wrapped):
    """transformers' norms work in float32; finite differences need them in float64."""
    for module in list(wrapped.model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return wrapped


def assert_derivatives(wrapped, inputs, epsilon=1e-5):
    """One random direction for every trainable parameter."""
    wrapped.zero_grad()
    wrapped(**inputs).loss.backward()
    checked = 0
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * epsilon)
                losses.append(wrapped(**inputs).loss)
                parameter.add_(direction, alpha=-sign * epsilon)
        numeric = (losses[0] - losses[1]) / (2 * epsilon)
        torch.testing.assert_close((parameter.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8, msg=name)
        checked += 1
    return checked


@pytest.mark.parametrize("kind", ["peft", "native"])
@pytest.mark.parametrize("site", ["output", "adapter_input", "rank"])
def test_gradcheck_of_the_whole_loss(kind, site):
    """With nothing detached the loss is an ordinary function of every parameter."""
    config = always_on(site=site, detach_source=False, kd_detach="none", source_layers=(5,), target_layers=(1,))
    wrapped = float64_clean(echo_model(kind, config))
    assert assert_derivatives(wrapped, batch()) == 6 * 5 * 2 + 5


@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck_with_the_echo_state_held_fixed(monkeypatch, dora):
    """By default z is a constant of the step: with z held fixed the same gradient is an ordinary derivative."""
    config = always_on(kd_weight=0.0, source_layers=(5,), target_layers=(1,))
    wrapped = float64_clean(echo_model("peft", config, dora=dora))
    inputs = batch()
    states = []
    pooled = BoundaryStates.pooled
    monkeypatch.setattr(BoundaryStates, "pooled", lambda self: states.append(pooled(self)) or states[-1])
    wrapped(**inputs).loss.backward()
    free = gradients(wrapped)
    monkeypatch.setattr(BoundaryStates, "pooled", lambda self: states[0].clone())
    wrapped.zero_grad()
    if not dora:  # DoRA's norm is a constant too, which finite differences would not know
        assert_derivatives(wrapped, inputs)
    else:
        wrapped(**inputs).loss.backward()
    for name, grad in gradients(wrapped).items():
        torch.testing.assert_close(grad, free[name], msg=name)


def test_a_source_that_is_not_detached_changes_the_gradient():
    """Guards the detach: without it the adapters would get gradient through z."""
    inputs = batch()
    found = []
    for detach in (True, False):
        torch.manual_seed(1)
        wrapped = echo_model("peft", always_on(detach_source=detach))
        wrapped(**inputs).loss.backward()
        found.append(gradients(wrapped))
    names = [name for name in found[0] if "layers.3" in name and "lora_" in name]
    assert names and any(not torch.allclose(found[0][name], found[1][name]) for name in names)


@pytest.mark.parametrize(("kd_detach", "echo_learns"), [("on", False), ("none", True), ("off", True)])
def test_what_distillation_teaches(kd_detach, echo_learns):
    """Echo networks get gradient from L_on only, unless the teacher is not detached."""
    inputs = batch()

    def kd_gradients():
        found = []
        for kd_weight in (0.0, 1.0):
            torch.manual_seed(1)
            wrapped = echo_model("peft", always_on(kd_detach=kd_detach, kd_weight=kd_weight))
            wrapped(**inputs).loss.backward()
            found.append(gradients(wrapped))
        return {name: (found[1][name] - found[0][name]).abs().max() for name in found[0]}

    difference = kd_gradients()
    echo = max(value for name, value in difference.items() if name.startswith("echo_networks"))
    assert (echo > 1e-9) == echo_learns
    assert max(value for name, value in difference.items() if "lora_A" in name) > 1e-9


def test_an_unrouted_step_is_a_plain_lora_step():
    inputs = batch()
    wrapped = echo_model("peft", always_on(echo_start_probability=0.0, echo_end_probability=0.0))
    calls = []
    inner = wrapped.model.base_model.model.model
    inner.register_forward_hook(lambda m, args, kwargs, out: calls.append(kwargs["use_cache"]), with_kwargs=True)
    output = wrapped(**inputs)
    output.loss.backward()
    assert calls == [False]  # one pass, and no key-value cache kept for nothing
    assert not output.routed and output.loss_on is None and output.loss_kd is None
    torch.testing.assert_close(output.loss.detach(), output.loss_off)
    assert all(parameter.grad is None for parameter in wrapped.echo_networks.parameters())
    lora = gradients(wrapped)
    wrapped.zero_grad()
    with wrapped.echo_off():
        wrapped(**inputs).loss.backward()  # transformers' own loss
    for name, grad in gradients(wrapped).items():
        torch.testing.assert_close(grad, lora[name], rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)


def test_every_trainable_parameter_moves_within_three_steps():
    wrapped = echo_model("peft", always_on(scale=0.1, gate_bias=-2.0), moved=False, dora=True)
    with torch.no_grad():  # from the real initial values
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    start = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        wrapped(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.advance()
    still = [name for name, p in wrapped.named_parameters() if name in start and torch.equal(p, start[name])]
    assert still == []


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    wrapped = echo_model("peft")
    whole = batch()
    count = int((whole["labels"][:, 1:] != -100).sum())
    wrapped(**whole).loss.backward()
    expected = gradients(wrapped)
    wrapped.zero_grad()
    for row in range(3):
        part = {key: value[row : row + 1] for key, value in whole.items()}
        wrapped(**part, num_items_in_batch=count).loss.backward()
    for name, grad in gradients(wrapped).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5 * scale + 1e-10, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["peft", "native"])
def test_gradient_checkpointing_recomputes_with_the_echo_of_its_pass(kind, use_reentrant):
    inputs = batch()
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        wrapped = echo_model(kind)
        if checkpointing:
            wrapped.model.enable_input_require_grads()
            wrapped.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        wrapped(**inputs).loss.backward()
        found.append(gradients(wrapped))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12, msg=name)
