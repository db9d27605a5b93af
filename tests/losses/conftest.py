"""The one place that says which backends these tests run against."""

import pytest
from linear_cases import device_for, why_not

BACKENDS = ("reference", "cpp", "triton")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    if request.param != "reference" and (reason := why_not(request.param)):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session", params=BACKENDS[1:])
def kernels(request):
    """The backends that are not the reference."""
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(request):
    chosen = "backend" if "backend" in request.fixturenames else "kernels"
    return device_for(request.getfixturevalue(chosen))
