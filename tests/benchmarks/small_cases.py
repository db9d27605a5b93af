"""Small cases to measure, and a fixed idea of what the device can do."""

import torch

from echolora_kernels import models
from echolora_kernels.benchmarks.cases import Filters, registry
from echolora_kernels.benchmarks.rates import Rates
from echolora_kernels.benchmarks.run import Bench
from echolora_kernels.benchmarks.timing import Timer

CPU = torch.device("cpu")
TINY = models.Model("tiny", 32, 40, 4, 2, 8, 8, 97, True, (16,))
FAST = ("frozen", "reference", "addmm", "ours*", "products", "modules", "plain*", "shared*", "packed*", "two-pass*")


def tiny_cases(monkeypatch, **filters):
    """Of a model small enough to run all that it has."""
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    return Filters(model=["tiny"], **filters).keep(registry(rows=32), CPU)


def custom_case(shape="24x40x32", **filters):
    (case,) = Filters(model=["custom"], **filters).keep(registry([shape]), CPU)
    return case


def tiny_bench(phases=("both",), **options):
    rates = Rates(10.0, {"fp32": 0.1, "bf16": 0.2})
    options = {"implementations": FAST, "rounds": 2, "memory": False, **options}
    return Bench(Timer(CPU, warm=True), rates, phases, **options)
