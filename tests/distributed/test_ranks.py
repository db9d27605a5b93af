"""What two processes do together, of which `worker.py` is the code: the wrappers of torch and accelerate, and runs."""

import json

import pytest
from launch import HERE, torchrun
from worker import CHECKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, model_folder, data_file):
    """Of every check, what each rank says; all of them by the same two processes, since starting takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(HERE / "worker.py", folder, model_folder, data_file)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(outcomes, name):
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "not reached") is None, f"rank {rank}: {outcome.get(name, 'not reached')}"
