"""The command from end to end on a tiny model: results, resume, and what it refuses."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from folders import Silent
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from echolora_kernels import CheckpointError, EchoConfig, NonFiniteLoss
from echolora_kernels.training import loop
from echolora_kernels.training.checkpoint import latest_checkpoint
from echolora_kernels.training.run import train
from echolora_kernels.training.settings import METHODS, TrainSettings


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_writes_an_ordinary_adapter(tmp_path, settings, method):
    settings = dataclasses.replace(settings, method=method, steps=40, dropout=0.0)
    metrics = train(settings, tmp_path / "run", Silent())
    history = metrics["history"]
    assert len(history) == 40
    assert sum(r["loss_off"] for r in history[-5:]) < 0.6 * sum(r["loss_off"] for r in history[:5])
    assert metrics["accuracy_after"] > metrics["accuracy_before"]
    assert metrics["reload_max_abs_logit_difference"] == 0.0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    routed = [r for r in history if r["routed"]]
    if settings.uses_echo:
        assert 10 < len(routed) < 40 and all(r["loss_on"] is not None for r in routed)
        assert history[0]["echo_probability"] == 1.0 and history[-1]["echo_probability"] < 0.25
    else:
        assert routed == [] and history[0]["loss_on"] is None
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == settings.uses_dora and config["r"] == 4
    assert {key.rpartition("_proj.")[2] for key in weights(tmp_path / "run")} == {
        "lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if settings.uses_dora else []),
    }  # fmt: skip
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings.model), tmp_path / "run" / "adapter")


@pytest.mark.parametrize("method", ["lora", "echo-dora"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, settings, method):
    settings = dataclasses.replace(settings, method=method)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    expected = train(settings, unbroken, Silent(), save_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(settings, broken, Silent(stop_after=7), save_every=5)
    assert latest_checkpoint(broken / "checkpoints").name == "step-000007"
    torch.manual_seed(99)  # another process would start from another state
    observer = Silent()
    resumed = train(settings, broken, observer, save_every=5, resume=True)
    assert "accuracy before" not in observer.stages
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(broken)[name]), name
    for a, b in zip(expected["history"], resumed["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert resumed["accuracy_before"] == expected["accuracy_before"]


def test_a_killed_process_resumes(tmp_path, model_folder, data_file):
    command = [
        sys.executable, "-m", "echolora_kernels.cli.main", "train", "--model", str(model_folder), "--data", str(data_file),
        "--steps", "400", "--batch-size", "2", "--save-every", "2", "--eval-size", "4", "--threads", "1",
        "--output", str(tmp_path / "run"), "--json", "--resume",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while latest_checkpoint(tmp_path / "run" / "checkpoints") is None and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "metrics.json").exists()
    (tmp_path / "run" / "checkpoints" / ".step-000399.x1y2" / "unfinished").mkdir(parents=True)  # as a kill leaves it
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert json.loads(done.stdout)["settings"]["steps"] == 400
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(again.stdout) == json.loads(done.stdout)


def test_an_occupied_folder_is_not_overwritten_unasked(tmp_path, settings):
    settings = dataclasses.replace(settings, steps=2, method="lora")
    first = train(settings, tmp_path, Silent())
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        train(settings, tmp_path, Silent())
    assert train(settings, tmp_path, Silent(), resume=True) == first
    other = dataclasses.replace(settings, lr=1e-4, echo=EchoConfig(kd_weight=0.5))
    with pytest.raises(CheckpointError, match=r"echo\.kd_weight was 1\.0, is 0\.5.*lr was 0\.005, is 0\.0001"):
        train(other, tmp_path, Silent(), resume=True)
    assert train(other, tmp_path, Silent(), overwrite=True)["settings"]["lr"] == 1e-4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_old_checkpoints_go(tmp_path, settings):
    train(dataclasses.replace(settings, method="lora"), tmp_path, Silent(), save_every=3, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000009", "step-000012"]


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, settings, monkeypatch):
    run = loop.Trainer._run

    def poisoned(self, batch, num_items):
        output = run(self, batch, num_items)
        if self.step == 8:
            output["loss"] = output["loss"] * float("nan")
        return output

    monkeypatch.setattr(loop.Trainer, "_run", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"loss became nan at step 9.*step-000006"):
        train(settings, tmp_path, Silent(), save_every=3)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000006"
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "checkpoints/step-000006/weights.safetensors").values()
    )


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, settings, monkeypatch):
    run = loop.Trainer._run

    def steep(self, batch, num_items):
        output = run(self, batch, num_items)
        parameter = self.parameters[0][1]
        return {**output, "loss": output["loss"] + (parameter - parameter.detach()).abs().sqrt().sum()}

    monkeypatch.setattr(loop.Trainer, "_run", steep)
    with pytest.raises(NonFiniteLoss, match="gradient norm became nan at step 1; there is no checkpoint yet"):
        train(settings, tmp_path, Silent())


def test_accumulated_micro_batches_are_one_batch(tmp_path, settings):
    """Answers of one, two and three tokens would weigh differently if each micro-batch were averaged alone."""
    lines = [{"instruction": f"What is {n} ?", "output": " ".join(["red"] * (n % 3 + 1))} for n in range(40)]
    data = tmp_path / "uneven.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        changes = {"batch_size": batch_size, "accumulate": accumulate, "data": str(data), "dropout": 0.0, "steps": 3}
        found.append(train(dataclasses.replace(settings, **changes), tmp_path / str(accumulate), Silent())["history"])
    for whole, parts in zip(*found, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_learning_rate_warms_up_and_falls():
    settings = TrainSettings(model="m", data="d", steps=100, lr=1.0, warmup=0.1)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 / 90) and all(rate > 0 for rate in rates)


def test_settings_reach_optimizer_clipping_and_adapter(tmp_path, settings, monkeypatch):
    clip, norms, groups = torch.nn.utils.clip_grad_norm_, [], []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm) or clip(parameters, norm)
    )
    update = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: groups.append(dict(self.param_groups[0])) or update(self)
    )
    settings = dataclasses.replace(settings, weight_decay=0.25, max_grad_norm=0.5, rslora=True, steps=5)
    train(settings, tmp_path, Silent())
    assert norms == [0.5] * 5 and {group["weight_decay"] for group in groups} == {0.25}
    assert [group["lr"] for group in groups] == [settings.learning_rate(step) for step in range(5)]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("method", ["lora", "echo-lora"])
def test_one_step_is_a_run(tmp_path, settings, method):
    train(dataclasses.replace(settings, steps=1, method=method), tmp_path, Silent())


def test_held_out_questions_may_be_longer_than_the_training_samples(tmp_path, settings):
    long = [{"instruction": "What is " + "the " * 40 + "thing ?", "output": "red"}] * 4
    (tmp_path / "long.json").write_text(json.dumps(long))
    changes = {"eval_data": str(tmp_path / "long.json"), "max_length": 40, "steps": 2}
    assert train(dataclasses.replace(settings, **changes), tmp_path / "run", Silent())["accuracy_after"] >= 0


def test_all_linear_is_every_linear_but_the_output_head(tmp_path, settings):
    train(dataclasses.replace(settings, target_modules=("all-linear",), steps=2), tmp_path, Silent())
    linears = {key.partition(".lora")[0].rpartition(".")[2] for key in weights(tmp_path)}
    assert linears == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_bfloat16_runs(tmp_path, settings):
    metrics = train(dataclasses.replace(settings, dtype="bfloat16", steps=4, dropout=0.0), tmp_path, Silent())
    assert metrics["reload_max_abs_logit_difference"] == 0.0
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
