"""Small layers: the fewest launches, the same numbers."""

from dataclasses import replace

import pytest
import torch
from group_cases import by_reference, cases, together
from linear_cases import assert_equal_up_to_rounding
from triton_cases import DEVICE, make, reference_results

from echolora_kernels.ops.echo_lora_linear import candidates, triton_kernels, triton_small_launch
from echolora_kernels.ops.echo_lora_linear.configs import FEW_LAUNCHES_ROWS, SMALL_RANK, SMALL_ROWS
from echolora_kernels.verification import suite

NEEDS = ("x", "lora_a", "lora_b")
FORWARD = {True: ["small_fwd_kernel"], False: ["shrink_fwd_kernel", "linear_fwd_kernel"]}
BACKWARD = {
    True: ["small_input_bwd_kernel", "small_adapter_bwd_kernel"],
    False: ["shrink_fwd_kernel", "input_bwd_kernel", "small_adapter_bwd_kernel"],
}
NONE = (None, None, None), (False, False, False)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 5, 16, SMALL_RANK])
def test_float64(small, launches, monkeypatch, p, bias, r):
    case = make(n=3, t=23, d_in=75, d_out=83, r=r, bias=bias, p=p)
    got = case.results("triton", NEEDS)
    assert launches == FORWARD[small] + BACKWARD[small]
    assert_equal_up_to_rounding(got, reference_results(case, monkeypatch, NEEDS))


def test_any_strides(small, launches):
    case = make(n=4, t=18, d_in=40, d_out=36, r=6, bias=False)
    spread = lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0]  # noqa: E731
    strided = replace(
        case,
        x=case.x.transpose(0, 1).contiguous().transpose(0, 1),
        weight=case.weight.t().contiguous().t(),
        lora_a=spread(case.lora_a),
        lora_b=case.lora_b.t().contiguous().t(),
        dy=case.dy[:, :1].expand_as(case.dy),
    )
    want = replace(strided, **{name: t.contiguous() for name, t in strided.tensors().items()})
    got = strided.results("triton", NEEDS)
    assert launches == FORWARD[small] + BACKWARD[small]
    assert_equal_up_to_rounding(got, want.results("reference", NEEDS))


@pytest.mark.parametrize("shape", [(7, 40), (2, 3, 4, 40), (40,)])
def test_any_dimensions(small, launches, shape):
    case = make(d_in=40, d_out=36, r=6, bias=False)
    case = replace(case, x=torch.randn(shape).to(case.x), dy=torch.randn(*shape[:-1], 36).to(case.dy))
    assert_equal_up_to_rounding(case.results("triton", NEEDS), case.results("reference", NEEDS))
    assert launches == FORWARD[small] + BACKWARD[small]


@pytest.mark.parametrize("needs", [("x",), ("lora_a", "lora_b"), ("x", "lora_b"), ("x", "bias", "lora_a", "lora_b")])
def test_other_gradients_go_on_from_the_same_s(small, launches, needs):
    case = make(n=2, t=19, d_in=40, d_out=36, r=6)
    assert_equal_up_to_rounding(case.results("triton", needs), case.results("reference", needs))
    count = len(FORWARD[small])
    assert launches[:count] == FORWARD[small] and BACKWARD[small][-1] not in launches[count:]


@pytest.mark.parametrize("options", [{"dora": True}, {"site": "output"}, {"site": "rank"}])
def test_dora_and_echoes_are_not_small(small, launches, options):
    make(r=6, **options).results("triton")
    assert not any(name.startswith("small") for name in launches)


@pytest.mark.parametrize("site", ["output", "rank"])
def test_a_constant_echo_changes_nothing_in_the_backward_pass(small, launches, site):
    case = make(n=2, t=19, d_in=40, d_out=36, r=6, bias=False, site=site)
    assert_equal_up_to_rounding(case.results("triton", NEEDS), case.results("reference", NEEDS))
    assert launches[2:] == BACKWARD[small]


def test_verify_compares_them(monkeypatch, launches):
    """The quick part, too."""
    monkeypatch.setattr(triton_kernels, "small", lambda rows, weight, rank: rank <= SMALL_RANK)
    monkeypatch.setattr(triton_small_launch, "_in_one", lambda *_: True)
    for check in suite.checks(quick=True, small=True):
        if check.operator.startswith("echo_lora_linear") and "no bias" in check.options:
            check.make("triton", DEVICE, torch.float32).compare()
    assert {*FORWARD[True], *BACKWARD[True]} == set(launches) - {"shrink_fwd_kernel"}  # which tells the dropout mask


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_groups(small, launches, monkeypatch, p):
    group = [replace(case, bias=None) for case in cases("triton", *NONE, p=p)]
    got = together(group, "triton", NEEDS)
    assert launches == FORWARD[small] * 3 + BACKWARD[small] * 3
    assert_equal_up_to_rounding(got, by_reference("triton", group, monkeypatch))


def test_a_group_with_dora_or_a_trained_bias_is_not_small(small, launches):
    together(cases("triton", NONE[0], (False, True, False)), "triton")
    assert not any(name.startswith("small") for name in launches)
    launches.clear()
    group = cases("triton", *NONE)
    assert_equal_up_to_rounding(together(group, "triton"), together(group, "reference"))
    assert BACKWARD[small][-1] not in launches


def test_adapters_in_another_dtype(small):
    """Float32 adapters on a float16 layer: their gradients are float32, as exact as plain torch's in float16."""
    case = make(n=2, t=40, d_in=64, d_out=48, r=8, bias=False).to(torch.float16)
    mixed = replace(case, lora_a=case.lora_a.float(), lora_b=case.lora_b.float())
    got, exact = mixed.results("triton", NEEDS), case.to(torch.float64).results("reference", NEEDS)
    plain = case.results("reference", NEEDS)
    assert got["lora_a"].dtype == got["lora_b"].dtype == torch.float32
    for name, value in exact.items():
        worst = (plain[name].double() - value).abs().max()
        assert (got[name].double() - value).abs().max() <= 1.5 * worst, name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_vendor_adds_its_products(monkeypatch, small, launches, p):
    """Kernels leave out the product with W0; the gradients of a group are added up in place."""
    prefer = lambda problem, *_: candidates.Choice(candidates.possible(problem)[-1], "test")  # noqa: E731
    monkeypatch.setattr(candidates, "choose", prefer)
    group = [replace(case, bias=None) for case in cases("triton", *NONE, p=p)]
    tensors = [t for case in group for t in (*case.tensors().values(), case.dy)]
    before = [t.clone() for t in tensors]
    assert_equal_up_to_rounding(together(group, "triton", NEEDS), by_reference("triton", group, monkeypatch))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_repeats_bit_for_bit(small):
    case = make(n=3, t=40, d_in=64, d_out=48, r=8, bias=False, dtype=torch.float32, p=0.2)
    first, second = case.results("triton", NEEDS), case.results("triton", NEEDS)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_which_layers_are_small(monkeypatch):
    is_small = triton_small_launch._is_small
    half, wide = torch.bfloat16, torch.float32
    assert is_small(2048, 4096, 4096, 16, half, "sm_90") and is_small(1024, 576, 576, 16, wide, "sm_80")
    assert not is_small(2048, 4096, 14336, 16, half, "sm_90") and not is_small(1024, 4096, 4096, 16, wide, "sm_90")
    assert triton_small_launch._is_tiny(1024, 576, 576, half) and not triton_small_launch._is_tiny(
        512, 4096, 4096, half
    )
    assert not is_small(SMALL_ROWS + 1, 64, 64, 16, half, "sm_90")
    assert is_small(8, 64, 64, 16, half, "sm_90") and not is_small(FEW_LAUNCHES_ROWS - 1, 4096, 4096, 16, half, "sm_90")
    assert not is_small(64, 64, 64, SMALL_RANK + 1, half, "sm_90")
    assert not is_small(64, 64, 64, 16, half, "cpu")  # the interpreter gains nothing
    monkeypatch.setattr(triton_small_launch, "_is_small", lambda *_: True)
    rows, weight = torch.empty(1, 64, 64), torch.empty(64, 64)
    monkeypatch.delenv(candidates.CANDIDATE_VARIABLE, raising=False)
    assert triton_small_launch.small(rows, weight, 16)
    monkeypatch.setenv(candidates.CANDIDATE_VARIABLE, "input-gradient=fused")
    assert not triton_small_launch.small(rows, weight, 16)
