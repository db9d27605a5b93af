"""Projections of one input on Triton: launches, and the products by the vendor's GEMM."""

import pytest
import torch
from group_cases import DORA_OF_THREE, SITES_OF_THREE, by_reference, cases, together
from linear_cases import assert_equal_up_to_rounding
from triton_cases import NORM

from echolora_kernels.ops.echo_lora_linear import candidates


@pytest.fixture
def vendor(monkeypatch):
    prefer = lambda problem, *_: candidates.Choice(candidates.possible(problem)[-1], "test")  # noqa: E731
    monkeypatch.setattr(candidates, "choose", prefer)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sites", SITES_OF_THREE)
@pytest.mark.parametrize("dora", DORA_OF_THREE)
def test_float64_by_the_vendor(vendor, sites, p, dora, monkeypatch):
    group = cases("triton", sites, dora, p)
    assert_equal_up_to_rounding(together(group, "triton"), by_reference("triton", group, monkeypatch))


def test_fast_dora_dropout_by_the_vendor(vendor, monkeypatch):
    group = cases("triton", dora=(True, True, False), p=0.3)
    want = by_reference("triton", group, monkeypatch, "fast")
    assert_equal_up_to_rounding(together(group, "triton", mode="fast"), want)


def test_the_vendor_changes_no_input_and_repeats_bit_for_bit(vendor):
    group = cases("triton", ("rank", "output", "adapter_input"), p=0.2)
    everything = [t for case in group for t in (*case.tensors().values(), case.dy)]
    before = [t.clone() for t in everything]
    first, second = together(group, "triton"), together(group, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_x_is_read_once_for_s_and_once_for_da(launches):
    together(cases("triton"), "triton")
    one = ["linear_fwd_kernel"]
    forward = ["shrink_fwd_kernel", *one, *NORM, *one, *one]
    backward = ["adapter_bwd_kernel"] * 3 + ["lora_a_bwd_kernel"] + ["input_bwd_kernel"] * 3
    assert launches == forward + backward


def test_gradients_by_descriptors_are_added_up_by_the_vendor(monkeypatch, launches):
    """Those kernels add to nothing; the pointer kernels that do are slower."""
    pick = lambda *_: candidates.Choice("fused", "test", "descriptor/small")  # noqa: E731
    monkeypatch.setattr(candidates, "choose", pick)
    group = cases("triton")
    assert_equal_up_to_rounding(together(group, "triton"), by_reference("triton", group, monkeypatch))
    assert launches.count("input_bwd_kernel") == 1
