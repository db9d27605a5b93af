"""What two processes do together, of which `worker.py` is the code: the wrappers of torch and accelerate, and runs."""

import dataclasses
import json

import pytest
from folders import Silent, run_settings
from launch import HERE, torchrun
from worker import CHECKS

from echolora_kernels.training.run import train


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, model_folder, data_file):
    """Of every check, what each rank says; all of them by the same two processes, since starting takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = dataclasses.replace(run_settings(model_folder, data_file), dropout=0.0)
    train(settings, folder / "one", Silent(), save_every=5)
    done = torchrun(HERE / "worker.py", folder, model_folder, data_file)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(outcomes, name):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "not reached") is None, f"rank {rank}: {outcome.get(name, 'not reached')}"
