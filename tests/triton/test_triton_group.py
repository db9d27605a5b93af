"""Projections of one input together: the same as one by one, with fewer reads of x."""

from dataclasses import replace

import pytest
import torch
from triton_cases import SEED, assert_equal_up_to_rounding, keep_mask, make

from echolora_kernels import Echo
from echolora_kernels.functional import echo_lora_linear_group
from echolora_kernels.ops.echo_lora_linear import Projection, candidates, reference

WIDTHS, RANKS = (21, 13, 34), (3, 5, 16)


def cases(
    sites=("output", "output", None), dora=(False, True, False), p=0.0, dtype=torch.float64, ranks=RANKS, **sizes
):
    """One `Case` a projection; they share x, the mask and the dropout."""
    made = [
        make(site=site, dora=d, d_out=d_out, r=r, p=p, dtype=dtype, bias=index != 1, **sizes)
        for index, (site, d, d_out, r) in enumerate(zip(sites, dora, WIDTHS, ranks, strict=True))
    ]
    first = made[0]
    mask = next((case.mask for case in made if case.mask is not None), None)
    return [
        replace(case, x=first.x, mask=mask if case.mask is not None else None, scaling=0.5 + 0.3 * index)
        for index, case in enumerate(made)
    ]


def leaves(group, needs):
    x = group[0].x.detach().requires_grad_("x" in needs)
    each = [{n: t.detach().requires_grad_(n in needs) for n, t in case.tensors().items() if n != "x"} for case in group]
    return x, each


def together(group, backend, needs=("x", "bias", "lora_a", "lora_b", "magnitude", "delta"), mode="exact"):
    """Every y and every gradient, by name and projection."""
    x, each = leaves(group, needs)
    projections = [
        Projection(
            t["weight"], t.get("bias"), t["lora_a"], t["lora_b"], case.scaling, t.get("magnitude"),
            None if case.site is None else Echo(t["delta"], case.mask, case.site),
        )
        for case, t in zip(group, each, strict=True)
    ]  # fmt: skip
    torch.manual_seed(SEED)
    ys = echo_lora_linear_group(x, projections, dropout_p=group[0].dropout_p, dora_dropout=mode, backend=backend)
    wanted = {f"{n}{i}": t for i, tensors in enumerate(each) for n, t in tensors.items() if t.requires_grad}
    if x.requires_grad:
        wanted["x"] = x
    grads = torch.autograd.grad(ys, list(wanted.values()), [case.dy for case in group]) if wanted else ()
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(wanted, grads, strict=True))


def by_reference(group, monkeypatch, mode="exact"):
    """The reference, given the kernels' dropout mask."""
    p = group[0].dropout_p
    if p:
        keep = keep_mask(group[0])
        drop = lambda x, p: x * keep.to(x.dtype) / (1 - p)  # noqa: E731
        monkeypatch.setattr(reference.F, "dropout", drop)
    return together(group, "reference", mode=mode)


@pytest.fixture(params=["fused", "vendor"])
def way(request, monkeypatch):
    if request.param == "vendor":
        prefer = lambda problem, *_: candidates.Choice(candidates.possible(problem)[-1], "test")  # noqa: E731
        monkeypatch.setattr(candidates, "choose", prefer)
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sites", [
    (None, None, None), ("output", "output", None), ("rank", "output", "adapter_input"),
    ("adapter_input", "adapter_input", "adapter_input"),
])  # fmt: skip
@pytest.mark.parametrize("dora", [(False, False, False), (True, True, True), (False, True, False)])
def test_float64(way, sites, p, dora, monkeypatch):
    group = cases(sites, dora, p)
    assert_equal_up_to_rounding(together(group, "triton"), by_reference(group, monkeypatch))


def test_fast_dora_dropout(way, monkeypatch):
    group = cases(dora=(True, True, False), p=0.3)
    want = by_reference(group, monkeypatch, "fast")
    assert_equal_up_to_rounding(together(group, "triton", mode="fast"), want)
    assert not torch.allclose(want["y0"], together(group, "triton")["y0"])


def test_the_reference_group_is_the_reference_one_by_one():
    group = cases(("rank", "output", "adapter_input"))
    got = together(group, "reference")
    singles = [case.results("reference") for case in group]
    for index, single in enumerate(singles):
        for name, value in single.items():
            if name != "x":
                torch.testing.assert_close(got[f"{name}{index}"], value)
    torch.testing.assert_close(got["x"], sum(single["x"] for single in singles))


def test_x_is_read_once_for_s_and_once_for_da(launches):
    together(cases(), "triton")
    one = ["linear_fwd_kernel"]
    forward = ["shrink_fwd_kernel", *one, "dora_norm_fwd_kernel", *one, *one]
    backward = ["adapter_bwd_kernel"] * 3 + ["lora_a_bwd_kernel"] + ["input_bwd_kernel"] * 3
    assert launches == forward + backward


@pytest.mark.parametrize("why", ["ranks add up to more than 256", "masks differ"])
def test_what_cannot_go_together_goes_one_by_one(launches, monkeypatch, why):
    if why == "masks differ":
        group = cases(("rank", "output", "adapter_input"), p=0.3)
        group[0] = replace(group[0], mask=~group[0].mask)
    else:
        group = cases(ranks=(100, 100, 100), p=0.3)
    got = together(group, "triton")
    assert launches.count("shrink_fwd_kernel") >= 3
    assert_equal_up_to_rounding(got, by_reference(group, monkeypatch))


def test_empty_batch():
    got = together(cases(n=0), "triton")
    assert got["y0"].shape == (0, 9, 21) and got["x"].shape == (0, 9, 19)
    assert got["lora_a0"].shape == (3, 19) and (got["lora_a0"] == 0).all()


@pytest.mark.parametrize(
    "needs", [(), ("x",), ("lora_a",), ("lora_b",), ("delta",), ("magnitude", "bias"), ("x", "lora_b")]
)
def test_only_what_is_needed(needs):
    group = cases(("rank", "output", "adapter_input"))
    assert_equal_up_to_rounding(together(group, "triton", needs), together(group, "reference", needs))


def test_inputs_are_not_changed_and_bits_repeat(way):
    group = cases(("rank", "output", "adapter_input"), p=0.2)
    everything = [t for case in group for t in (*case.tensors().values(), case.dy)]
    before = [t.clone() for t in everything]
    first, second = together(group, "triton"), together(group, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_some_outputs_unused():
    group = cases(("rank", "output", "adapter_input"))
    found = []
    for backend in ("triton", "reference"):
        x, each = leaves(group, ("x", "lora_a"))
        projections = [
            Projection(t["weight"], t.get("bias"), t["lora_a"], t["lora_b"], 1.0, t.get("magnitude")) for t in each
        ]
        ys = echo_lora_linear_group(x, projections, backend=backend)
        found.append(torch.autograd.grad(ys[1], [x, each[1]["lora_a"]], group[1].dy))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bad_arguments_name_the_projection():
    group = cases()
    good = [Projection(c.weight, c.bias, c.lora_a, c.lora_b, 1.0) for c in group]
    bad = replace(good[1], lora_b=good[1].lora_b[:, :-1])
    for backend in ("reference", "triton"):
        with pytest.raises(ValueError, match=r"projections\[1\]: lora_b: got shape"):
            echo_lora_linear_group(group[0].x, [good[0], bad], backend=backend)
        with pytest.raises(ValueError, match="projections: got none"):
            echo_lora_linear_group(group[0].x, [], backend=backend)
        mixed = [good[0], replace(good[2], lora_a=good[2].lora_a.float(), lora_b=good[2].lora_b.float())]
        with pytest.raises(TypeError, match=r"projections\[1\]: lora_a: got dtype torch.float32"):
            echo_lora_linear_group(group[0].x, mixed, backend=backend)
