"""Any number of threads gives the same bits: sums are cut by shapes alone."""

from dataclasses import replace

import pytest
import torch
from group_cases import cases, together
from linear_cases import SITES, make
from native_cases import python
from operator_cases import OPERATORS, call
from operator_cases import make as make_arguments
from torch.utils._python_dispatch import TorchDispatchMode

THREADS = (1, 2, 4)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# 700 rows are 22 blocks and 6 chunks, widths of 300 to 600 are 3 to 5 blocks of columns, all with a rest
N, T, D_IN, D_OUT, R = 5, 140, 333, 555, 12
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}

pytestmark = pytest.mark.usefixtures("library")


class ProductsOnOneThread(TorchDispatchMode):
    """Runs torch's matrix products on one thread, so that only what the library computes can differ.

    They do not promise the same bits. Measured with torch 2.13 on an AMX processor: bfloat16 products of 700 rows differ
    between 1 and 2 or 4 threads at some widths, float32 and float64 ones for a single row; not for 700 rows.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        threads = torch.get_num_threads()
        if function.overloadpacket in PRODUCTS:
            torch.set_num_threads(1)
        try:
            return function(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_any_number_of_threads_agrees(compute):
    found = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        with ProductsOnOneThread():
            found[threads] = compute()
    for threads in THREADS[1:]:
        assert found[threads].keys() == found[1].keys()
        for name, value in found[1].items():
            assert value.isfinite().all() and torch.equal(found[threads][name], value), (threads, name)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer(dtype, site, dora, p):
    case = make("cpp", N, T, D_IN, D_OUT, R, site=site, dora=dora, p=p, dtype=dtype)
    assert_any_number_of_threads_agrees(lambda: case.results("cpp"))


def test_adapters_wider_than_the_layer():
    case = make("cpp", N, T, D_IN, D_OUT, R, site="output", dora=True, p=0.3, dtype=torch.bfloat16)
    case = replace(case, lora_a=case.lora_a.float(), lora_b=case.lora_b.float())
    assert_any_number_of_threads_agrees(lambda: case.results("cpp"))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sites", [(None, None, None), ("rank", "output", "adapter_input")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group(dtype, sites, p):
    group = cases("cpp", sites, p=p, dtype=dtype, n=N, t=T, d_in=D_IN)
    assert_any_number_of_threads_agrees(lambda: together(group, "cpp"))


@pytest.mark.parametrize("t", [1, 33, T])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operator(dtype, operator, t):
    """Alone, and with so few rows that threads are left without work."""

    def compute():
        torch.manual_seed(0)
        return call(operator, make_arguments(operator, dtype, n=2, t=t, d_in=D_IN, d_out=D_OUT))

    assert_any_number_of_threads_agrees(compute)


def test_the_work_is_given_to_several_threads():
    code = """
import os, torch
from echolora_kernels import native
assert not native.why_unavailable()
x, a = torch.randn(5, 140, 333), torch.randn(12, 333)
for threads in (1, 4):
    torch.set_num_threads(threads)
    torch.ops.echolora.shrink(x, a, 1.0, None, 0, 1.0, None, 0, None, None)
    print(len(os.listdir("/proc/self/task")))
"""
    alone, several = map(int, python(code).split())
    assert several == alone + 3


def test_large_sums():
    """Rows are cut into fewer chunks where the sums of all of them would take much memory, and by sizes alone there."""
    torch.manual_seed(0)
    dy, s, b = torch.randn(1, 1, 7000).expand(1, 1500, 7000), torch.randn(1500, 256), torch.randn(7000, 256)
    needs = (False, True, False, False, False)  # B's gradient
    compute = torch.ops.echolora.adapter_backward
    assert_any_number_of_threads_agrees(lambda: {"db": compute(dy, s, b, 1.0, None, None, None, *needs, False)[1]})


@pytest.mark.parametrize("of_a", [False, True])
def test_scratch_is_bounded(of_a):
    rows, width, r = 4096, 8192, 128
    dy = torch.ones(()).expand(1, rows, width)  # as x too, so that A's sums are as large
    s, b = torch.ones(rows, r), torch.ones(width, r)
    rest = (None, None, 0, 1.0, None, None, None, False, True, False, False, False)
    with torch.profiler.profile(profile_memory=True) as seen:
        torch.ops.echolora.linear_backward(dy, s, b, 1.0, None, None, None, dy if of_a else None, *rest)
    # one chunk's sums of each gradient take 4 MiB, and so does B as the kernel reads it
    most = 4 * 2**20 * ((2 * 8 if of_a else 16) + 1)
    largest = max(event.nbytes() for event in seen.profiler.kineto_results.events())  # of single allocations
    assert most / 2 < largest <= most
