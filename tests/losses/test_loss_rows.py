"""The losses of rows of logits: against the reference, over layouts, dtypes and extremes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from linear_cases import assert_equal_up_to_rounding, device_for, error_ratios, why_not
from loss_cases import PARTS, rows

from echolora_kernels import BackendUnavailable
from echolora_kernels.losses import echo_distillation, echo_distillation_rows

MODES = ("on", "none", "off")


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("vocabulary", [1, 16, 37, 2500, 9001])
def test_vocabularies(kernels, vocabulary, routed):
    """Less than a vector, and more than a block, with and without a rest."""
    case = rows(kernels, 4, vocabulary, routed=routed, kd_detach="none", temperature=1.7, kd_weight=0.3)
    for part in PARTS if routed else PARTS[:2]:
        assert_equal_up_to_rounding(case.results(kernels, part), case.results("reference", part))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [1.0, 2.0, 0.6])
def test_modes(kernels, mode, tau):
    case = rows(kernels, kd_detach=mode, temperature=tau, num_items=11)
    assert_equal_up_to_rounding(case.results(kernels), case.results("reference"))
    assert_equal_up_to_rounding(case.results(kernels, "loss_kd"), case.results("reference", "loss_kd"))


def test_rows_are_what_the_positions_become(backend, device):
    off, on = (torch.randn(2, 5, 6, dtype=torch.float64, device=device) for _ in range(2))
    labels = torch.tensor([[-100, 3, 1, -100, 2], [4, -100, 0, 5, -100]], device=device)
    whole = echo_distillation(off, on, labels, backend=backend)
    chosen = echo_distillation_rows(off[:, :-1], on[:, :-1], labels[:, 1:], backend=backend)
    flat = echo_distillation_rows(off[:, :-1].flatten(0, 1), on[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for a, b, c in zip(whole, chosen, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (1, 2, 1, 3)])
def test_any_leading_shape(backend, shape):
    case = rows(backend, max(1, math.prod(shape)))
    shaped = replace(
        case,
        off=case.off.view(*shape, -1),
        on=case.on.view(*shape, -1),
        targets=case.targets.view(shape).clamp_min(0),
    )
    case = replace(case, targets=case.targets.clamp_min(0))
    got, want = shaped.results(backend), case.results("reference")
    assert got["off"].shape == shaped.off.shape
    for name in want:
        torch.testing.assert_close(got[name].view_as(want[name]), want[name], rtol=1e-10, atol=1e-12)


def fenced(tensor):
    """The same values with NaN all round, between rows and between columns."""
    room = tensor.new_full([2 * size + 2 for size in tensor.shape], math.nan)
    return room[tuple(slice(1, -1, 2) for _ in tensor.shape)].copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_strides(kernels, dtype):
    if reason := why_not(kernels, dtype):
        pytest.skip(reason)
    case = rows(kernels, 6, 70, dtype=dtype, kd_detach="none")
    wide = torch.cat([case.off, case.on], 1)
    layouts = {
        "fenced": (fenced(case.off), fenced(case.on)),
        "transposed": (case.off.t().contiguous().t(), case.on.t().contiguous().t()),
        "side by side": (wide[:, :70], wide[:, 70:]),
        "one of each": (case.off, fenced(case.on)),
    }
    want = case.results(kernels)
    for name, (off, on) in layouts.items():
        # not through `leaves`, whose detach keeps strides, but so that nothing could have made them contiguous
        got = replace(case, off=off, on=on).results(kernels)
        assert got["off"].is_contiguous(), name
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=4 * torch.finfo(value.dtype).eps, atol=1e-7)


def test_expanded_logits(kernels):
    case = rows(kernels, 5)
    expanded = replace(case, off=case.off[:1].expand(5, -1), on=case.on[1:2].expand(5, -1))
    assert_equal_up_to_rounding(expanded.results(kernels), expanded.results("reference"))


def test_offsets_beyond_int32(kernels, device):
    stride = 2**30
    try:
        room = torch.empty(3 * stride + 64, dtype=torch.float16, device=device)  # 6 GB, of which four pages are touched
    except RuntimeError:
        pytest.skip("no 6 GB of address space")
    off = room.as_strided((4, 40), (stride, 1))
    case = rows(kernels, 4, 40, dtype=torch.float16, kd_detach="none")
    off.copy_(case.off)
    got, want = replace(case, off=off, on=off).results(kernels), replace(case, on=case.off).results(kernels)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_what_is_not_written_shows(kernels, monkeypatch):
    """Results and statistics begin as NaN; every element of a gradient is written."""
    case = rows(kernels, 6, 70, kd_detach="none")
    want = case.results(kernels)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        got = case.results(kernels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert not got["off"][::3].any() and not got["on"][::3].any()


def test_rows_without_a_target_may_hold_anything(kernels):
    case = rows(kernels, 7)
    spoiled = replace(case, off=case.off.clone(), on=case.on.clone())
    spoiled.off[::3], spoiled.on[::3] = math.nan, math.inf
    got, want = spoiled.results(kernels), case.results(kernels)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_arguments_are_unchanged_and_a_second_backward_gives_the_same(kernels):
    case = rows(kernels, kd_detach="none").leaves()
    before = [t.detach().clone() for t in (case.off, case.on, case.targets)]
    loss = case.call(kernels).loss
    incoming = torch.full_like(loss, 0.7)
    first = torch.autograd.grad(loss, (case.off, case.on), incoming, retain_graph=True)
    first[0].mul_(2)  # a gradient is the caller's
    second = torch.autograd.grad(loss, (case.off, case.on), incoming)
    assert torch.equal(first[0], 2 * second[0]) and torch.equal(first[1], second[1]) and incoming == 0.7
    assert all(torch.equal(a.detach(), b) for a, b in zip((case.off, case.on, case.targets), before, strict=True))


def test_only_the_logits_themselves_are_saved(kernels):
    case = rows(kernels, 6, 70).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(kernels)
    large = [t for t in saved if t.numel() > 6 * 7]
    assert {t.data_ptr() for t in large} == {case.off.data_ptr(), case.on.data_ptr()}


def test_only_what_asks_gets_a_gradient(kernels):
    case = rows(kernels, kd_detach="none")
    want = case.results("reference")
    for name in ("off", "on"):
        leaf = getattr(case, name).clone().requires_grad_()
        (got,) = torch.autograd.grad(replace(case, **{name: leaf}).call(kernels).loss, leaf)
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-12)


def test_double_backward_is_refused(kernels):
    case = rows(kernels).leaves()
    (gradient,) = torch.autograd.grad(case.call(kernels).loss, case.off, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_branches_in_two_dtypes(kernels):
    case = rows(kernels, dtype=torch.float32)
    mixed = replace(case, on=case.on.half())
    got, want = mixed.results(kernels), mixed.results("reference")
    assert got["on"].dtype == torch.float16
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_branches_have_exactly_no_divergence(kernels, dtype):
    for tau in (1.0, 2.0, 0.7):
        case = rows(kernels, 5, 3000, dtype=dtype, kd_detach="none", temperature=tau)
        found = replace(case, on=case.off.clone()).results(kernels, "loss_kd")
        assert found["loss_kd"] == 0 and not found["off"].any() and not found["on"].any()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(kernels, scale):
    case = rows(kernels, dtype=torch.float32, kd_detach="none")
    huge = replace(case, off=case.off * scale, on=case.on * scale)
    got, want = huge.results(kernels), huge.results("reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 2.0, 0.7])
def test_excluded_tokens(backend, tau):
    """Both branches exclude some: what the others alone give, and no gradient for these."""
    case = rows(backend, kd_detach="none", temperature=tau)
    excluded = torch.arange(37, device=case.off.device) >= 30
    case = replace(case, targets=case.targets.clamp_max(29))
    masked = replace(case, off=case.off.masked_fill(excluded, -math.inf), on=case.on.masked_fill(excluded, -math.inf))
    small = replace(case, off=case.off[:, :30], on=case.on[:, :30])
    for part in PARTS:
        got, want = masked.results(backend, part), small.results("reference", part)
        want |= {name: F.pad(want[name], (0, 7)) for name in ("off", "on")}
        assert_equal_up_to_rounding(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("who", ["off", "on"])
def test_tokens_that_one_branch_excludes(kernels, who, mode):
    """As the reference: the KL is infinite where OFF alone excludes one, and the gradients are those of the others."""
    case = rows(kernels, kd_detach=mode)
    logits = getattr(case, who).clone()
    logits[:, 30:] = -math.inf
    case = replace(case, targets=case.targets.clamp_max(29), **{who: logits})
    got, want = case.results(kernels), case.results("reference")
    assert want["loss_kd"].isinf() == (who == "off")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, equal_nan=True)
    if mode == "on":
        assert got["off"].isfinite().all() and got["on"].isfinite().all()


def test_first_columns_excluded_beyond_a_block(kernels):
    case = rows(kernels, 3, 9001, dtype=torch.float32)
    off, on = case.off.clone(), case.on.clone()
    off[:, :5000], on[:, :5000] = -math.inf, -math.inf
    case = replace(case, off=off, on=on, targets=case.targets.clamp(max=4000) + 5000 * (case.targets >= 0))
    got, want = case.results(kernels), case.results("reference")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_comes_through(kernels, value):
    case = rows(kernels, dtype=torch.float32)
    off = case.off.clone()
    off[1, 5] = value
    assert replace(case, off=off).call(kernels).loss_off.isnan()
    assert replace(case, off=off).call("reference").loss_off.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [1.0, 0.01])
@pytest.mark.parametrize("tau", [1.0, 2.0, 0.7])
def test_as_exact_as_torch(kernels, dtype, near, tau):
    """Each loss, and all gradients, over sixteen draws: a single scalar's error is a matter of luck."""
    if reason := why_not(kernels, dtype):
        pytest.skip(reason)
    draws = []
    for _ in range(16):
        case = rows(kernels, 5, 1500, dtype=dtype, near=near, kd_detach="none", temperature=tau)
        draws.append((case.results(kernels), case.results("reference"), case.to(torch.float64).results("reference")))
    joined = [{name: torch.stack([draw[i][name] for draw in draws]) for name in PARTS} for i in range(3)]
    for i in range(3):
        joined[i]["gradients"] = torch.stack([draw[i][name] for draw in draws for name in ("off", "on")])
    for name, (largest, rms) in error_ratios(*joined).items():
        assert largest <= 1.5 and rms <= 1.5, (name, largest, rms)


def test_wrong_targets(kernels, device):
    case = rows(kernels, dtype=torch.float32)
    for target in (-1, 37, 2**40):
        targets = case.targets.clone()
        targets[1] = target
        wrong = replace(case, targets=targets)
        if kernels == "cpp":
            with pytest.raises(RuntimeError, match=f"targets: got {target}, wants -100 or a column of 37"):
                wrong.call(kernels)
        else:
            assert wrong.call(kernels).loss.isnan()


def test_refusals(kernels):
    off = torch.empty(3, 4, device="meta")
    with pytest.raises(BackendUnavailable, match=f"logits_off: got device meta, wants .*{kernels}"):
        echo_distillation_rows(off, None, torch.empty(3, dtype=torch.int64, device="meta"), backend=kernels)
    case = rows(kernels)
    with pytest.raises(TypeError, match="logits_off: got dtype"):
        replace(case, off=case.off.to(torch.float8_e4m3fn), on=None).call(kernels)


BAD = {
    "logits_off 0-D": ({"logits_off": torch.zeros(())}, ValueError, "logits_off"),
    "logits_on shape": ({"logits_on": torch.zeros(5, 7)}, ValueError, "logits_on"),
    "logits_on dtype": ({"logits_on": torch.zeros(5, 6, dtype=torch.int64)}, ValueError, "logits_on"),
    "targets shape": ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, "targets"),
    "targets dtype": ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "targets"),
    "targets device": ({"targets": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "targets"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
    "kd_weight": ({"kd_weight": -1.0}, ValueError, "kd_weight"),
    "kd_detach": ({"kd_detach": "both"}, ValueError, "kd_detach"),
    "num_items": ({"num_items": -1}, ValueError, "num_items"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(changes, error, name, backend):
    device = device_for(backend)
    changes = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in changes.items()
    }
    logits, targets = torch.zeros(5, 6, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    with pytest.raises(error, match=f"^{name}: got .*wants"):
        echo_distillation_rows(
            **{"logits_off": logits, "logits_on": logits, "targets": targets, "backend": backend, **changes}
        )
