"""`--bench` of the suite: which cases, in the flags of `echolora bench`."""

from __future__ import annotations

import shlex

import pytest
import torch

from echolora_kernels.benchmarks import command
from echolora_kernels.benchmarks.run import wanted

# flags of how `echolora bench` takes its time and of what it writes, where pytest-benchmark has its own
NOT_HERE = ("timer", "seconds", "time_limit", "warm", "no_memory", "roofline", "output", "list")


def pytest_addoption(parser):
    parser.addoption(
        "--bench", default="", help="flags of `echolora bench`, such as \"--cases 'smollm2/layer/*' --rank 16\""
    )


def pytest_generate_tests(metafunc):
    """One test for each implementation of each case in each phase; what is not there is one that is skipped."""
    parser = command.parser()
    options = parser.parse_args(shlex.split(metafunc.config.getoption("--bench")))
    for name in NOT_HERE:
        if getattr(options, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise pytest.UsageError(f"--bench: got {flag}, which is for `echolora bench`, not for pytest-benchmark")
    device = command.device_of(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = []
    for case in command.cases_of(options, device):
        problem = case.build(device)
        names = [
            name
            for name in (*problem.implementations, *problem.absent)
            if wanted(name, problem, options.implementations) and name not in command.left_out(options)
        ]
        found += [(case, phase, name) for name in names for phase in options.phase]
    metafunc.parametrize("device", [device])
    metafunc.parametrize("rounds", [options.rounds or 10], ids=[""])
    metafunc.parametrize(
        ("case", "phase", "name"), found, ids=[f"{case.name}-{phase}-{name}" for case, phase, name in found]
    )
