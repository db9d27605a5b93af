"""The command started by torchrun."""

import dataclasses
import json

from folders import Silent
from launch import HERE, torchrun
from run_cases import assert_same_run, cut

from echolora_kernels.training.run import train


def flags(settings, output):
    """Of a run with `settings`, which saves every 5 steps."""
    chosen = {name: getattr(settings, name) for name in ("model", "data", "steps", "batch_size", "accumulate", "lr",
                                                         "rank", "dropout", "eval_size", "device")}  # fmt: skip
    chosen |= {"bottleneck": 8, "echo_scale": 1.0, "gate_bias": 0.0, "save_every": 5, "output": output}
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_two_processes_take_the_steps_of_one_which_can_go_on_from_theirs(tmp_path, settings):
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

    train(settings, cut(two), Silent(), save_every=5, resume=True)
    assert_same_run(two, one)


def test_a_process_that_fails_ends_the_run(tmp_path, settings):
    done = torchrun(HERE / "failing.py", "train", *flags(settings, tmp_path))
    assert done.returncode != 0
    assert "echolora (rank 1): the cable is out" in done.stderr, done.stderr
