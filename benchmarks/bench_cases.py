"""The registry's cases under pytest-benchmark; run with `make bench`.

Every implementation is first compared with float64, and a red check reports no time. Here each is timed by itself, with
warm caches and by the host's clock; `echolora bench` lets them take turns, with cold ones.
"""

import functools

import pytest
import torch

from echolora_kernels.benchmarks.run import judge
from echolora_kernels.benchmarks.timing import eager_turn


@functools.lru_cache(maxsize=1)  # the tests of a case follow each other
def problem_of(case, device):
    return case.build(device)


def test_case(benchmark, case, phase, name, device, rounds):
    problem = problem_of(case, device)
    if name in problem.absent:
        pytest.skip(problem.absent[name])
    implementation = problem.implementations[name]
    verdict = judge(case, name, implementation, device)
    assert verdict.problem is None, verdict.problem
    turn = eager_turn(implementation, phase)

    def run(state):
        turn.action(state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{case.name} {phase}"
    benchmark.extra_info["error"] = verdict.ratio
    benchmark.pedantic(run, setup=lambda: ((turn.setup(),), {}), warmup_rounds=1, rounds=rounds)
