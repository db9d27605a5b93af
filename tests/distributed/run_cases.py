"""Runs of the command: comparing two, and undoing the end of one."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from echolora_kernels.training.checkpoint import latest_checkpoint


def assert_same_run(got, wanted):
    """Adapters and histories, up to the rounding of float32 sums in another order."""
    adapters = [load_file(output / "adapter" / "adapter_model.safetensors") for output in (got, wanted)]
    for name, value in adapters[1].items():
        assert (adapters[0][name] - value).abs().max() < 1e-4 * value.abs().max(), name
    histories = [json.loads((output / "metrics.json").read_text())["history"] for output in (got, wanted)]
    for ours, theirs in zip(*histories, strict=True):
        for name in ("routed", "tokens", "skipped_samples", "learning_rate", "echo_probability"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "loss_off", "loss_on", "grad_norm"):
            assert ours[name] == (theirs[name] and pytest.approx(theirs[name], rel=1e-4)), name


def cut(output):
    """What was there when the last checkpoint but one had been written."""
    shutil.rmtree(latest_checkpoint(output / "checkpoints"))
    shutil.rmtree(output / "adapter")
    (output / "metrics.json").unlink()
    return output
