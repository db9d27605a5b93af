"""The floor against figures worked out by hand, and the device's own rates."""

import pytest
import torch
from small_cases import CPU

from echolora_kernels.benchmarks import floor, rates

BF16 = {"dora": False, "dropout": 0.0, "itemsize": 2}
FAST_GPU = rates.Rates(4200.0, {"bf16": 700.0})


def _least(stages, *names):
    return floor.milliseconds([stage for stage in stages if not names or stage.name in names], FAST_GPU, "bf16")


@pytest.mark.parametrize(
    ("m", "k", "n", "product", "adds"),
    [
        (8192, 4096, 4096, 0.393, 0.048),
        (8192, 4096, 14336, 1.374, 0.088),
        (8192, 14336, 4096, 1.374, 0.128),
        (8192, 4096, 1024, 0.098, 0.036),
    ],
)
def test_two_products_and_reading_x_twice_and_dy_once(m, k, n, product, adds):
    stages = floor.layer(m, k, [n], 16, **BF16)
    for phase in ("forward", "backward"):
        assert _least(stages[phase], "base") == pytest.approx(product, abs=6e-4)
    assert _least(stages["both"], "S = x A^T", "dB and dS", "dA") == pytest.approx(adds, abs=6e-4)
    # and what the low-rank terms take in the base products, which no traffic hides
    low_rank = 2 * m * 16 * (k + n) / 700e9
    assert _least(stages["both"]) == pytest.approx(2 * product + adds + low_rank, abs=2e-3)


def test_a_large_rank_is_bound_by_arithmetic():
    (small, large) = (floor.layer(512, 256, [256], rank, **BF16)["forward"] for rank in (8, 4096))
    slow = rates.Rates(100.0, {"bf16": 0.1})
    shrink = [[stage for stage in stages if stage.name == "S = x A^T"] for stages in (small, large)]
    assert floor.milliseconds(shrink[1], slow, "bf16") == pytest.approx(2 * 512 * 256 * 4096 / 1e8)
    assert floor.milliseconds(shrink[0], rates.Rates(0.1, {"bf16": 0.1}), "bf16") == pytest.approx(512 * 256 * 2 / 1e5)


def test_groups_share_x_and_dora_reads_the_weight_and_y():
    one, three = (floor.layer(64, 32, [16] * n, 4, **BF16)["both"] for n in (1, 3))
    size = lambda stages, name: sum(stage.size for stage in stages if stage.name == name)  # noqa: E731
    assert size(three, "S = x A^T") == size(one, "S = x A^T") == 64 * 32 * 2
    assert size(three, "dB and dS") == 3 * 64 * 16 * 2
    dora = floor.layer(64, 32, [16], 4, dora=True, dropout=0.0, itemsize=2)["both"]
    assert sum(s.size for s in dora) - sum(s.size for s in one) == 2 * (32 * 16 + 64 * 16)
    dropped = floor.layer(64, 32, [16], 4, dora=True, dropout=0.1, itemsize=2)["forward"]
    assert dropped[0].flops == 2 * dora[0].flops


def test_measured_rates_are_plausible(monkeypatch):
    monkeypatch.setitem(rates._COPY, "cpu", 2**24)
    monkeypatch.setitem(rates._SIDE, "cpu", 256)
    found = rates.measure(CPU, ["fp32"])
    assert 0.05 < found.gigabytes < 5000 and 1e-4 < found.teraflops["fp32"] < 100
    # a product as large as the one that was measured takes about as long as the floor says
    a = torch.randn(256, 256)
    seconds = min(rates._best(lambda: a @ a, CPU) for _ in range(3))
    least = floor.milliseconds(floor.layer(256, 256, [256], 1, **BF16)["forward"][:1], found, "fp32")
    assert 0.05 < 1e3 * seconds / least < 20


def test_a_quantised_weight_is_read_as_it_is_stored():
    (whole, four_bits) = (
        floor.layer(64, 256, [512], 16, dora=True, dropout=0.0, itemsize=2, weight_size=size)["forward"]
        for size in (None, 0.5)
    )
    sizes = [{stage.name: stage.size for stage in stages} for stages in (whole, four_bits)]
    for name in ("base", "norm of W0 + s B A"):
        assert sizes[0][name] - sizes[1][name] == 1.5 * 256 * 512
