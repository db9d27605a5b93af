"""The whole operator against the reference: forward and every gradient."""

import itertools
from dataclasses import replace

import pytest
import torch
from triton_cases import (
    DEVICE,
    SITES,
    assert_equal_up_to_rounding,
    error_ratios,
    make,
    reference_results,
)

RATIO = 1.5


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_float64(site, dora, p, monkeypatch):
    case = make(site=site, dora=dora, p=p)
    assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))


@pytest.mark.parametrize("r", [1, 3, 8, 16, 33, 64, 128, 256])
def test_ranks(r, monkeypatch):
    case = make(r=r, site="rank", dora=True, p=0.2)
    assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))


@pytest.mark.parametrize(("n", "t", "d_in", "d_out"), [(1, 1, 1, 1), (1, 70, 35, 67), (5, 1, 130, 17), (3, 40, 64, 32)])
@pytest.mark.parametrize("site", [None, "output", "adapter_input"])
def test_shapes(n, t, d_in, d_out, site, monkeypatch):
    case = make(n, t, d_in, d_out, site=site, dora=True, p=0.2)
    assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))


@pytest.mark.parametrize("shape", [(19,), (11, 19), (2, 3, 4, 19)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_leading_dimensions(shape, p, monkeypatch):
    case = make(p=p)
    x, dy = torch.randn(shape, dtype=torch.float64, device=DEVICE), torch.randn(*shape[:-1], 21, dtype=torch.float64)
    case = replace(case, x=x, dy=dy.to(DEVICE))
    assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))


def test_float_mask_weighs(monkeypatch):
    for site in SITES[1:]:
        case = make(site=site, dora=True, float_mask=True)
        assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))


def test_no_bias():
    case = make(bias=False, dora=True)
    assert_equal_up_to_rounding(case.results("triton"), case.results("reference"))


def test_zero_gain_still_has_a_magnitude_gradient():
    case = make(dora=True, site="output")
    case.magnitude[::3] = 0
    got = case.results("triton")
    assert_equal_up_to_rounding(got, case.results("reference"))
    assert (got["magnitude"][::3] != 0).all()


def test_zero_row_has_a_finite_gain():
    case = make(dora=True)
    case.weight[2], case.lora_b[2], case.magnitude[2], case.dy[..., 2] = 0, 0, 0.5, 0.5
    assert torch.isfinite(case.results("triton")["y"]).all()


def test_unfrozen_weight():
    for dora in (False, True):
        case = make(dora=dora, site="output")
        names = tuple(case.tensors())
        assert_equal_up_to_rounding(case.results("triton", names), case.results("reference", names))


@pytest.mark.parametrize(
    ("dora", "site", "p"), [(False, "output", 0.0), (True, "adapter_input", 0.3), (True, "rank", 0.0)]
)
def test_every_combination_of_needed_gradients(dora, site, p, monkeypatch):
    case = make(n=2, t=5, d_in=7, d_out=6, dora=dora, site=site, p=p)
    names = [name for name in case.tensors() if name != "weight"]
    every = reference_results(case, monkeypatch)
    for size in range(len(names) + 1):
        for needs in itertools.combinations(names, size):
            want = {name: every[name] for name in ("y", *needs)}
            assert_equal_up_to_rounding(case.results("triton", needs), want)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_float32_is_as_exact_as_torch(site, dora, p, monkeypatch, record_property):
    case = make(n=2, t=93, d_in=150, d_out=141, r=12, site=site, dora=dora, p=p, dtype=torch.float32)
    got = case.results("triton")
    plain = reference_results(case, monkeypatch)
    ratios = error_ratios(got, plain, case.to(torch.float64).results("reference"))
    record_property("ratios", str(ratios))
    assert max(max(pair) for pair in ratios.values()) <= RATIO, ratios


def test_float32_adapters_on_a_narrower_layer():
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    case = make(n=2, t=20, d_in=40, d_out=33, r=4, site="output", dora=True, dtype=dtype)
    wide = {name: getattr(case, name).float() for name in ("lora_a", "lora_b", "magnitude", "delta")}
    case = replace(case, **wide)
    got, exact = case.results("triton"), case.to(torch.float64).results("reference")
    for name, value in case.results("reference").items():
        assert got[name].dtype == value.dtype, name
    for name, value in exact.items():
        error = (got[name].double() - value).abs().max() / value.abs().max()
        assert error < 8 * torch.finfo(dtype).eps, (name, error)
