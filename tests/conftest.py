"""Settings every test runs under."""

import pytest
import torch

pytest_plugins = ["commands", "folders"]

torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes minutes; runs with -m full only")


def pytest_collection_modifyitems(config, items):
    if "full" in config.option.markexpr:
        return
    for item in items:
        if "full" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m full"))
