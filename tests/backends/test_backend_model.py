"""A whole training step through a backend's kernels: same losses and gradients as through the reference."""

import pytest
import torch
from tiny import always_on, batch, echo_model, gradients


@pytest.mark.parametrize(
    ("site", "dora"), [("output", False), ("output", True), ("rank", False), ("adapter_input", True)]
)
def test_an_echo_step(backend, device, site, dora, calls, monkeypatch):
    inputs = {name: tensor.to(device) for name, tensor in batch("left").items()}
    found = []
    for name in ("reference", backend):
        monkeypatch.setenv("ECHOLORA_BACKEND", name)
        torch.manual_seed(5)
        config = always_on(site=site, source_layers=(2,), target_layers=(0, 1))
        wrapped = echo_model("native", config, dora=dora, num_hidden_layers=3).to(device)
        output = wrapped(**inputs)
        output.loss.backward()
        found.append((output, gradients(wrapped)))
        assert bool(calls) == (name == backend)
    (want, want_gradients), (got, got_gradients) = found
    for name in ("loss", "loss_off", "loss_on", "loss_kd"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-8)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-4, atol=1e-6 * scale + 1e-12, msg=name)
