"""A disk that is full while something is saved, and folders that cannot be written to."""

import dataclasses
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from folders import Silent
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments

from echolora_kernels.integrations.saving import replacing, updating
from echolora_kernels.integrations.trainer import EchoTrainer
from echolora_kernels.training.checkpoint import latest_checkpoint, save_checkpoint
from echolora_kernels.training.run import save_adapter, train

ADAPTER = "adapter_model.safetensors"
needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no limit on the size of files")


@contextmanager
def full_disk(size=2000):
    """No file grows beyond `size` bytes, as if there were no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def of_echo_lora(echo, folder):
    echo.save_pretrained(folder)


def of_a_trainer(echo, folder):
    args = TrainingArguments(str(folder.parent / "trainer"), report_to=[], use_cpu=True)
    EchoTrainer(model=echo, args=args).save_model(str(folder))


def of_a_run(echo, folder):
    save_adapter(echo.model, folder)


@needs_limits
@pytest.mark.parametrize("save", [of_echo_lora, of_a_trainer, of_a_run])
def test_the_old_adapter_survives(save, tmp_path):
    echo, folder = tiny.echo_model(dtype=torch.float32), tmp_path / "deep" / "adapter"
    with pytest.raises(OSError, match=r"adapter: could not be written \(.*as it was"), full_disk():
        save(echo, folder)
    assert not folder.exists()
    save(echo, folder)
    before = contents(folder)
    tiny.randomise(echo)
    with pytest.raises(OSError, match=r"adapter: could not be written \(.*as it was"), full_disk():
        save(echo, folder)
    assert contents(folder) == before
    save(echo, folder)
    loaded = PeftModel.from_pretrained(tiny.base_model(dtype=torch.float32), folder)
    new = {name: value for name, value in echo.model.state_dict().items() if "lora_" in name}
    assert len(new) == 60 and all(
        torch.equal(value, new[name]) for name, value in loaded.state_dict().items() if name in new
    )
    assert contents(folder).keys() == before.keys() and contents(folder)[ADAPTER] != before[ADAPTER]


def test_an_echo_lora_s_adapter_is_peft_s_and_other_files_stay(tmp_path):
    echo = tiny.echo_model(dtype=torch.float32)
    for folder in (tmp_path / "stock", tmp_path / "ours"):
        folder.mkdir()
        (folder / "notes.txt").write_text("kept")
        (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    echo.model.save_pretrained(tmp_path / "stock")
    echo.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "stock")
    assert "Mine." in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.parametrize("broken", ["a folder in the way", "the last file", "an interrupt"])
def test_files_take_their_places_together(tmp_path, monkeypatch, broken):
    for name in ("config", "weights"):
        (tmp_path / name).write_text("old")
    rename, moved = Path.rename, []

    def failing(path, target):
        if "new" in path.parts and moved.append(path) is None and len(moved) == 3:
            raise KeyboardInterrupt if broken == "an interrupt" else OSError("no")
        return rename(path, target)

    if broken == "a folder in the way":
        (tmp_path / "extra").mkdir()
    monkeypatch.setattr(Path, "rename", failing)
    before = contents(tmp_path)
    with pytest.raises((OSError, KeyboardInterrupt)), updating(tmp_path) as unfinished:
        for name in ("config", "weights", "extra"):
            (unfinished / name).write_text("new")
    assert contents(tmp_path) == before


@needs_limits
def test_the_old_checkpoint_survives(tmp_path):
    model = tiny.peft_model(dtype=torch.float32)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in parameters])
    save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=1)
    before = contents(tmp_path)
    for step in (1, 2):
        with pytest.raises(OSError, match=f"step-00000{step}: could not be written"), full_disk():
            save_checkpoint(tmp_path, step, parameters, optimizer, {}, keep=1)
        assert contents(tmp_path) == before
    assert latest_checkpoint(tmp_path).name == "step-000001"


class FillsUp(Silent):
    """Leaves no room once a step is done."""

    def training(self, records, total, done):
        for record in super().training(records, total, done):
            yield record
            if record.step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@needs_limits
def test_a_run_goes_on_once_there_is_room(tmp_path, settings):
    settings = dataclasses.replace(settings, steps=6, eval_size=2)
    train(settings, tmp_path / "unbroken", Silent(), save_every=2)
    with full_disk(resource.RLIM_INFINITY), pytest.raises(OSError, match="step-000006: could not be written"):
        train(settings, tmp_path / "broken", FillsUp(), save_every=2)
    assert latest_checkpoint(tmp_path / "broken" / "checkpoints").name == "step-000004"
    train(settings, tmp_path / "broken", Silent(), save_every=2, resume=True)
    ends = [load_file(tmp_path / name / "adapter" / ADAPTER) for name in ("unbroken", "broken")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("writing", [replacing, updating])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_other_errors_are_passed_on(writing, error, tmp_path):
    folder = tmp_path / "folder"
    for _ in range(2):  # without and with something there
        before = contents(tmp_path)
        with pytest.raises(type(error)), writing(folder) as unfinished:
            (unfinished / "file").write_text("new")
            raise error
        assert contents(tmp_path) == before
        with writing(folder) as unfinished:
            (unfinished / "below").mkdir()
            (unfinished / "below" / "file").write_text("old")
        assert contents(folder) == {"below": None, "below/file": b"old"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder in which nobody can make a file")
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(settings):
    observer = Silent()
    with pytest.raises(PermissionError, match=r"^output: got /proc/run, but /proc cannot be written to \("):
        train(settings, "/proc/run", observer)
    assert observer.stages == []
    echo = tiny.echo_model(dtype=torch.float32)
    with pytest.raises(OSError, match=r"^/proc/run: could not be written \("):
        echo.save_pretrained("/proc/run")
