"""An interrupt keeps the last complete step, and the resumed run ends as the unbroken one."""

import dataclasses

import pytest
import torch
from folders import Silent
from safetensors.torch import load_file

from echolora_kernels.training import loop
from echolora_kernels.training.checkpoint import latest_checkpoint
from echolora_kernels.training.run import train


def interrupt(monkeypatch, where):
    """Raise KeyboardInterrupt in step 8: in its second micro-batch, half through the update, or right after it."""
    if where == "forward":
        run, calls = loop.Trainer._run, []

        def second_micro_batch(self, *arguments):
            calls.append(self.step)
            if calls.count(7) == 2:
                raise KeyboardInterrupt
            return run(self, *arguments)

        monkeypatch.setattr(loop.Trainer, "_run", second_micro_batch)
        return
    update, steps = torch.optim.AdamW.step, []

    def broken(self, *arguments):
        steps.append(1)
        if len(steps) == 8 and where == "update":
            self.param_groups[0]["params"][0].data.add_(1.0)
        if len(steps) < 8 or where == "updated":
            update(self, *arguments)
        if len(steps) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)


@pytest.mark.parametrize(("where", "kept"), [("forward", 7), ("update", 5), ("updated", 5)])
def test_an_interrupt_inside_a_step(tmp_path, settings, where, kept):
    settings = dataclasses.replace(settings, dropout=0.3, steps=10)
    train(settings, tmp_path / "unbroken", Silent())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, where)
        train(settings, tmp_path / "broken", Silent(), save_every=5)
    assert latest_checkpoint(tmp_path / "broken/checkpoints").name == f"step-00000{kept}"
    torch.manual_seed(99)
    train(settings, tmp_path / "broken", Silent(), resume=True)
    ends = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("unbroken", "broken")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
