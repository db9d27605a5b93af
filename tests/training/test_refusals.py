"""What a run refuses, and that nothing of an earlier run is lost by it."""

import dataclasses
import json
import math
import shutil

import pytest
from folders import Silent

from echolora_kernels import CheckpointError, DataError, EchoConfig, NonFiniteLoss
from echolora_kernels.training import loop
from echolora_kernels.training.checkpoint import latest_checkpoint
from echolora_kernels.training.run import train


@pytest.mark.parametrize(("change", "word"), [
    ({"method": "full"}, "method"), ({"dtype": "float16"}, "dtype"), ({"rank": 0}, "rank"), ({"steps": 0}, "steps"),
    ({"lr": 0.0}, "lr"), ({"dropout": 1.0}, "dropout"), ({"warmup": -0.1}, "warmup"), ({"batch_size": 0}, "batch_size"),
    ({"weight_decay": -0.1}, "weight_decay"), ({"seed": -1}, "seed"), ({"device": "gpu"}, "device.*cuda:N"),
    ({"device": "cuda:x"}, "device"), ({"quantize": "nf3"}, "quantize: got 'nf3', wants one of nf4, int8, or None"),
    *[({name: value}, f"{name}: got {value}")
      for name in ("lr", "alpha", "dropout", "warmup", "weight_decay", "max_grad_norm") for value in (math.inf, math.nan)],
])  # fmt: skip
def test_settings_are_validated(settings, change, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        dataclasses.replace(settings, **change)


@pytest.mark.parametrize(("options", "word"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"save_every": 0}, "save_every"), ({"keep": 0}, "keep"),
])  # fmt: skip
def test_arguments_of_a_run_are_validated(tmp_path, settings, options, word):
    with pytest.raises(ValueError, match=f"^{word}: got 0"):
        train(settings, tmp_path / "run", Silent(), **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", [".", "run"])
def test_an_output_that_is_a_file_is_refused_first(tmp_path, settings, inside):
    (tmp_path / "file").write_text("")
    observer = Silent()
    with pytest.raises(NotADirectoryError, match=r"^output: got .*file"):
        train(settings, tmp_path / "file" / inside, observer)
    assert observer.stages == []


def test_unknown_target_modules_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=r"target_modules.*query.*q_proj"):
        train(dataclasses.replace(settings, target_modules=("query",)), tmp_path, Silent())


@pytest.mark.parametrize(("change", "error"), [
    ({"data": "missing.json"}, DataError), ({"eval_size": 60}, DataError), ({"model": "/no/such"}, FileNotFoundError),
    ({"max_length": 1}, DataError), ({"target_modules": ("query",)}, ValueError),
    ({"echo": EchoConfig(source_layers=(70,))}, ValueError), ({"device": "cuda:99"}, ValueError),
])  # fmt: skip
def test_a_refused_run_overwrites_nothing_and_leaves_no_folder(tmp_path, settings, change, error):
    old = tmp_path / "old"
    train(dataclasses.replace(settings, steps=1, eval_size=2), old, Silent())
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    for output in (old, tmp_path / "new"):
        with pytest.raises(error):
            train(dataclasses.replace(settings, **change), output, Silent(), overwrite=True)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "json", "binary", "settings", "accuracy_before", "history", "other"]
)
def test_a_damaged_checkpoint_is_refused(tmp_path, settings, damage):
    settings = dataclasses.replace(settings, method="lora", steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path, Silent(stop_after=3), save_every=3)
    folder = latest_checkpoint(tmp_path / "checkpoints")
    state = folder / "state.json"
    if damage == "truncate":
        (folder / "weights.safetensors").write_bytes(b"1234")
    elif damage == "remove":
        (folder / "optimizer.safetensors").unlink()
    elif damage == "json":
        state.write_text("{")
    elif damage == "binary":
        state.write_bytes(b"\xff\xff")
    elif damage == "other":
        shutil.copy(folder / "optimizer.safetensors", folder / "weights.safetensors")
    else:
        state.write_text(
            json.dumps({name: value for name, value in json.loads(state.read_text()).items() if name != damage})
        )
    with pytest.raises(CheckpointError, match=rf"step-000003.*{damage if '_' in damage else ''}"):
        train(settings, tmp_path, Silent(), resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 1}', '{"settings": {}}', '{"accuracy_before": 0}'])
def test_damaged_metrics_are_refused(tmp_path, settings, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"metrics\.json"):
        train(settings, tmp_path, Silent(), resume=True)


def test_other_folders_among_the_checkpoints_stay(tmp_path, settings):
    (tmp_path / "checkpoints" / "step-best").mkdir(parents=True)
    train(dataclasses.replace(settings, steps=3), tmp_path, Silent(), resume=True, save_every=1, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-best"]


def test_old_checkpoints_are_those_of_lower_number(tmp_path, settings, monkeypatch):
    """Names have six digits: sorted as text, step 1000000 would go before 999999."""
    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda folder, step, *rest: save(folder, step + 999_997, *rest))
    train(dataclasses.replace(settings, steps=4), tmp_path, Silent(), save_every=1, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-1000000", "step-1000001"}


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, settings, monkeypatch):
    take = loop.Trainer._take_step

    def overflowing(self, step):
        record = take(self, step)
        if step == 5:  # counted from 0: the loss is fine, the update is not
            self.parameters[0][1].data.fill_(math.inf)
        return record

    monkeypatch.setattr(loop.Trainer, "_take_step", overflowing)
    with pytest.raises(NonFiniteLoss, match=r"parameter .* at step 6; the last good checkpoint is .*step-000003"):
        train(settings, tmp_path, Silent(), save_every=3)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000003"
