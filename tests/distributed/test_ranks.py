"""What two processes do together: the wrappers of torch, accelerate and transformers, and runs of the command."""

import dataclasses
import json

import pytest
from folders import Silent, run_settings
from launch import HERE, torchrun

from echolora_kernels.training.run import train


@pytest.mark.timeout(600)
def test_every_check_of_the_worker_holds(tmp_path, model_folder, data_file):
    """One test, since starting the two processes takes longer than most checks."""
    settings = dataclasses.replace(run_settings(model_folder, data_file), dropout=0.0)
    train(settings, tmp_path / "one", Silent(), save_every=5)
    done = torchrun(HERE / "worker.py", tmp_path, model_folder, data_file, timeout=500)
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    outcomes = [json.loads(file.read_text()) for file in files]
    failures = [
        f"rank {rank}, {name}: {outcome}"
        for rank, of_rank in enumerate(outcomes)
        for name, outcome in of_rank.items()
        if outcome is not None
    ]
    assert not failures, "\n".join(failures)
    assert done.returncode == 0, done.stderr
    assert outcomes[0].keys() == outcomes[1].keys() and len(outcomes[0]) > 30
