"""Runs on a base that bitsandbytes quantises."""

import dataclasses
import importlib.util

import pytest
from folders import Silent

from echolora_kernels.integrations.transformers import load_model
from echolora_kernels.training.run import train


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")


@pytest.mark.parametrize(
    ("quantize", "method", "kind"), [("nf4", "echo-lora", "Linear4bit"), ("int8", "lora", "Linear8bitLt")]
)
def test_a_quantised_run_learns(bitsandbytes, tmp_path, settings, quantize, method, kind):
    """After an evaluation, which on some CPUs would leave a 4-bit weight without gradient, and through ours alone."""
    settings = dataclasses.replace(settings, method=method, quantize=quantize, steps=10, eval_size=3, dropout=0.0)
    model, _ = load_model(settings.model, quantize=quantize)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["q_proj"] is getattr(bitsandbytes.nn, kind) and kinds["lm_head"] is not kinds["q_proj"]
    observer = Silent()
    metrics = train(settings, tmp_path / "run", observer)
    losses = [record["loss_off"] for record in metrics["history"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert metrics["settings"]["quantize"] == quantize and metrics["reload_max_abs_logit_difference"] < 1e-4
    assert not any("PEFT computes" in stage for stage in observer.stages)


def test_what_is_refused(tmp_path, settings, monkeypatch):
    refused = dataclasses.replace(settings, quantize="int8", method="echo-dora")
    with pytest.raises(ValueError, match=r"^quantize: got 'int8' with echo-dora on a CPU"):
        train(refused, tmp_path / "run", Silent())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^quantize: got 'nf4', which takes bitsandbytes; pip install .*"):
        train(dataclasses.replace(settings, quantize="nf4"), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
