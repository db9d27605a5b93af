"""These tests are about the compiled library; where there is none, they say why."""

import pytest

from echolora_kernels import native


@pytest.fixture
def library():
    """The operators of the library."""
    import torch

    if reason := native.why_unavailable():
        pytest.skip(reason)
    return torch.ops.echolora


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 20 seconds; runs with the others")
