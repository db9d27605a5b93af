"""Projections of one input together: the same as one by one, with fewer reads of x."""

from dataclasses import replace

import pytest
import torch
from group_cases import DORA_OF_THREE, SITES_OF_THREE, by_reference, cases, leaves, together
from linear_cases import assert_equal_up_to_rounding, why_not

from echolora_kernels.functional import echo_lora_linear_group
from echolora_kernels.ops.echo_lora_linear import Projection
from echolora_kernels.ops.echo_lora_linear.kernels import load


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sites", SITES_OF_THREE)
@pytest.mark.parametrize("dora", DORA_OF_THREE)
def test_float64(backend, sites, p, dora, monkeypatch):
    group = cases(backend, sites, dora, p)
    assert_equal_up_to_rounding(together(group, backend), by_reference(backend, group, monkeypatch))


def test_fast_dora_dropout(backend, monkeypatch):
    group = cases(backend, dora=(True, True, False), p=0.3)
    want = by_reference(backend, group, monkeypatch, "fast")
    assert_equal_up_to_rounding(together(group, backend, mode="fast"), want)
    assert not torch.allclose(want["y0"], together(group, backend)["y0"])


def test_the_reference_group_is_the_reference_one_by_one():
    group = cases("reference", ("rank", "output", "adapter_input"))
    got = together(group, "reference")
    singles = [case.results("reference") for case in group]
    for index, single in enumerate(singles):
        for name, value in single.items():
            if name != "x":
                torch.testing.assert_close(got[f"{name}{index}"], value)
    torch.testing.assert_close(got["x"], sum(single["x"] for single in singles))


def test_x_is_read_once_for_s_and_once_for_da(backend, calls):
    together(cases(backend), backend)
    forward = ["shrink", "linear_product", "dora_norm", "linear_product", "linear_product"]
    backward = ["adapter_backward"] * 3 + ["lora_a_backward", "group_input_product"]
    # the group's product may be made of single ones
    assert [name for name in calls if name != "input_product"] == forward + backward


def test_masks_that_differ_go_one_by_one(backend, calls, monkeypatch):
    group = cases(backend, ("rank", "output", "adapter_input"), p=0.3)
    group[0] = replace(group[0], mask=~group[0].mask)
    got = together(group, backend)
    assert calls.count("linear_forward" if load(backend).fused else "shrink") == 3
    assert_equal_up_to_rounding(got, by_reference(backend, group, monkeypatch))


def test_only_ranks_that_add_up_to_more_than_the_kernels_take_go_one_by_one(backend, calls, monkeypatch):
    group = cases(backend, ranks=(100, 100, 100), p=0.3)
    got = together(group, backend)
    assert load(backend).max_rank < 300
    assert calls.count("linear_backward" if load(backend).fused else "lora_a_backward") == 3
    assert_equal_up_to_rounding(got, by_reference(backend, group, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("narrow", [False, True])
def test_autocast_narrows_no_gradient(backend, dtype, narrow):
    """The small products behind the kernels' sums: autocast gives what the same dtypes give without it."""
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    group = cases(backend, ("rank", "output", "adapter_input"), dtype=torch.float32)
    if narrow:
        x = group[0].x.to(dtype)
        to = lambda tensor: None if tensor is None else tensor.to(dtype)  # noqa: E731
        group = [replace(c, x=x, weight=to(c.weight), bias=to(c.bias), dy=to(c.dy)) for c in group]
    autocast = torch.autocast(group[0].x.device.type, dtype)
    got = together(group, backend, forward_in=autocast if narrow else None, backward_in=autocast)
    want = together(group, backend)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def test_empty_batch(backend):
    got = together(cases(backend, n=0), backend)
    assert got["y0"].shape == (0, 9, 21) and got["x"].shape == (0, 9, 19)
    assert got["lora_a0"].shape == (3, 19) and (got["lora_a0"] == 0).all()


@pytest.mark.parametrize(
    "needs", [(), ("x",), ("lora_a",), ("lora_b",), ("delta",), ("magnitude", "bias"), ("x", "lora_b")]
)
def test_only_what_is_needed(backend, needs):
    group = cases(backend, ("rank", "output", "adapter_input"))
    assert_equal_up_to_rounding(together(group, backend, needs), together(group, "reference", needs))


def test_inputs_are_not_changed_and_bits_repeat(backend):
    group = cases(backend, ("rank", "output", "adapter_input"), p=0.2)
    everything = [t for case in group for t in (*case.tensors().values(), case.dy)]
    before = [t.clone() for t in everything]
    first, second = together(group, backend), together(group, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def group_of(group, needs):
    """x, the tensors of each projection, and the projections without echo."""
    x, each = leaves(group, needs)
    projections = [
        Projection(t["weight"], t.get("bias"), t["lora_a"], t["lora_b"], 1.0, t.get("magnitude")) for t in each
    ]
    return x, each, projections


def test_some_outputs_unused(backend):
    group = cases(backend, ("rank", "output", "adapter_input"))
    found = []
    for name in (backend, "reference"):
        x, each, projections = group_of(group, ("x", "lora_a"))
        ys = echo_lora_linear_group(x, projections, backend=name)
        found.append(torch.autograd.grad(ys[1], [x, each[1]["lora_a"]], group[1].dy))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_output_that_no_loss_depends_on_leaves_its_projection_without_gradients(backend):
    group = cases(backend, sites=(None, None, None), dora=(True, True, False))
    x, each, projections = group_of(group, ("x", "bias", "lora_a", "lora_b", "magnitude"))
    ys = echo_lora_linear_group(x, projections, backend=backend)
    (ys[0].sum() + ys[2].sum()).backward()
    assert all(tensor.grad is None for tensor in each[1].values())
    assert all(tensor.grad is not None for n in (0, 2) for name, tensor in each[n].items() if name != "weight")


def test_what_no_gradient_needs_is_not_saved(backend):
    """x with frozen A's, and the weights of an x without gradient: they may be overwritten before the backward pass."""
    for needs, overwritten in ((("x", "lora_b"), "x"), (("lora_a", "lora_b"), "weight")):
        group = cases(backend, sites=(None, None, None))
        x, each, projections = group_of(group, needs)
        moved = x + 0 if x.requires_grad else x
        ys = echo_lora_linear_group(moved, projections, backend=backend)
        wanted = torch.autograd.grad(ys, each[0]["lora_b"], [case.dy for case in group], retain_graph=True)
        with torch.no_grad():
            (moved if overwritten == "x" else each[0]["weight"]).zero_()
        got = torch.autograd.grad(ys, each[0]["lora_b"], [case.dy for case in group])
        assert torch.equal(got[0], wanted[0])


@torch.no_grad()
def test_without_gradients_no_product_is_stored(backend, monkeypatch):
    kernels, stored = load(backend), []
    product = kernels.linear_product
    monkeypatch.setattr(
        kernels, "linear_product", lambda *a, **named: stored.append(named["store_z"]) or product(*a, **named)
    )
    _, _, projections = group_of(group := cases(backend, sites=(None, None, None), dora=(True,) * 3), ("magnitude",))
    echo_lora_linear_group(group[0].x, projections, backend=backend)
    assert stored == [False] * 3


def test_bad_arguments_name_the_projection(backend):
    group = cases(backend)
    good = [Projection(c.weight, c.bias, c.lora_a, c.lora_b, 1.0) for c in group]
    bad = replace(good[1], lora_b=good[1].lora_b[:, :-1])
    for name in ("reference", backend):
        with pytest.raises(ValueError, match=r"projections\[1\]: lora_b: got shape"):
            echo_lora_linear_group(group[0].x, [good[0], bad], backend=name)
        with pytest.raises(ValueError, match="projections: got none"):
            echo_lora_linear_group(group[0].x, [], backend=name)
        mixed = [good[0], replace(good[2], lora_a=good[2].lora_a.float(), lora_b=good[2].lora_b.float())]
        with pytest.raises(TypeError, match=r"projections\[1\]: lora_a: got dtype torch.float32"):
            echo_lora_linear_group(group[0].x, mixed, backend=name)
