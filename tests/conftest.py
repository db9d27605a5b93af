"""Settings every test runs under."""

import pytest
import torch

pytest_plugins = ["folders"]

torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
