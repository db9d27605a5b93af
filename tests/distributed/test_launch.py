"""The command started by torchrun."""

import dataclasses
import json
import shutil

import pytest
from folders import Silent
from launch import HERE, torchrun
from safetensors.torch import load_file

from echolora_kernels.training.checkpoint import latest_checkpoint
from echolora_kernels.training.run import train


def flags(settings, output):
    """Of a run with `settings`, which saves every 5 steps."""
    chosen = {name: getattr(settings, name) for name in ("model", "data", "steps", "batch_size", "accumulate", "lr",
                                                         "rank", "dropout", "eval_size", "device")}  # fmt: skip
    chosen |= {"bottleneck": 8, "echo_scale": 1.0, "gate_bias": 0.0, "save_every": 5, "output": output}
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]


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


def test_one_process_and_two_take_the_same_steps_and_go_on_from_each_other(tmp_path, settings):
    """A step of 9 samples: micro-batches of 3 and 2 here, of 3 and 1 there."""
    settings = dataclasses.replace(settings, dropout=0.0, batch_size=3, accumulate=3, eval_size=5)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = train(settings, one, Silent(), save_every=5)
    done = torchrun("-m", "echolora_kernels.cli.main", "train", *flags(settings, two), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2  # printed once
    assert done.stderr.count("step 12/12") == 1
    assert json.loads(done.stdout)["accuracy_after"] == alone["accuracy_after"]
    assert_same_run(two, one)

    copy = shutil.copytree(one, tmp_path / "copy")
    done = torchrun("-m", "echolora_kernels.cli.main", "train", *flags(settings, cut(copy)), "--resume")
    assert "resuming after step 10" in done.stderr, done.stderr
    assert_same_run(copy, one)
    train(settings, cut(two), Silent(), save_every=5, resume=True)
    assert_same_run(two, one)


def test_a_process_that_fails_ends_the_run(tmp_path, settings):
    done = torchrun(HERE / "failing.py", "train", *flags(settings, tmp_path))
    assert done.returncode != 0
    assert "echolora (rank 1): the cable is out" in done.stderr, done.stderr
