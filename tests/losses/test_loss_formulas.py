"""`losses.echo_distillation`, every backend, against loops over the positions."""

import math

import pytest
import torch
from linear_cases import why_not

from echolora_kernels.losses import echo_distillation

BACKENDS = ["reference", "cpp", "triton"]
MODES = ["on", "none", "off"]
LABELS = [[-100, -100, 3, 1, -100], [2, -100, -100, 0, 4], [-100, 1, -100, -100, -100]]
Q = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 0)]  # written out: the position before each supervised label


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Where there is a GPU, Triton's tensors are there."""
    with device:
        yield


def problem(dtype=torch.float64):
    off, on = (torch.randn(3, 5, 6).double().mul(2).to(dtype).requires_grad_() for _ in range(2))
    return off, on, torch.tensor(LABELS)


def loops(off, on, labels, *, teacher=None, student=None, tau=2.0, divisor=5):
    """(L_off, L_on, L_kd) from explicit exponentials; teacher and student stand in for on and off in the KL."""
    teacher, student = (on if teacher is None else teacher), (off if student is None else student)
    loss_off = loss_on = loss_kd = torch.zeros((), dtype=torch.float64)
    for n, t in Q:
        target = labels[n, t + 1]
        loss_off = loss_off - (off[n, t, target] - off[n, t].exp().sum().log())
        loss_on = loss_on - (on[n, t, target] - on[n, t].exp().sum().log())
        p = (teacher[n, t] / tau).exp() / (teacher[n, t] / tau).exp().sum()
        q = (student[n, t] / tau).exp() / (student[n, t] / tau).exp().sum()
        for v in range(len(p)):
            loss_kd = loss_kd + tau * tau * p[v] * (p[v].log() - q[v].log())
    return loss_off / divisor, loss_on / divisor, loss_kd / divisor


def gradients(loss, *tensors):
    """Zeros where nothing arrives."""
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("kd_weight", [0.0, 1.0, 0.3])
def test_formula(mode, tau, kd_weight, backend):
    off, on, labels = problem()
    options = {"temperature": tau, "kd_weight": kd_weight, "kd_detach": mode, "backend": backend}
    result = echo_distillation(off, on, labels, **options)
    expected = loops(off, on, labels, tau=tau)
    assert_near(torch.stack([result.loss_off, result.loss_on, result.loss_kd]), torch.stack(expected))
    assert_near(result.loss, expected[0] + expected[1] + kd_weight * expected[2])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_go_where_the_mode_says(mode, backend):
    off, on, labels = problem()
    result = echo_distillation(off, on, labels, kd_weight=0.7, kd_detach=mode, backend=backend)
    teacher = on.detach() if mode == "on" else on
    student = off.detach() if mode == "off" else off
    loss_off, loss_on, loss_kd = loops(off, on, labels, teacher=teacher, student=student)
    for got, expected in (
        (result.loss_off, loss_off),
        (result.loss_on, loss_on),
        (result.loss_kd, loss_kd),
        (result.loss, loss_off + loss_on + 0.7 * loss_kd),
    ):
        for ours, theirs in zip(gradients(got, off, on), gradients(expected, off, on), strict=True):
            assert_near(ours, theirs)
    kd_off, kd_on = (g.any().item() for g in gradients(result.loss_kd, off, on))
    assert (kd_off, kd_on) == {"on": (True, False), "none": (True, True), "off": (False, True)}[mode]


def test_defaults(backend):
    """tau 2, weight 1, the ON branch detached: METHOD.md."""
    off, on, labels = problem()
    result = echo_distillation(off, on, labels, backend=backend)
    same = {"temperature": 2.0, "kd_weight": 1.0, "kd_detach": "on", "num_items": len(Q), "backend": backend}
    explicit = echo_distillation(off, on, labels, **same)
    assert_near(torch.stack(result), torch.stack(explicit))
    assert_near(gradients(result.loss, on)[0], gradients(result.loss_on, on)[0])


def test_gradcheck(backend):
    off, on, labels = problem()
    fast = {"fast_mode": backend == "triton"}  # the interpreter is slow
    free = {"kd_weight": 0.7, "backend": backend}

    def both(off, on):
        return tuple(echo_distillation(off, on, labels, kd_detach="none", **free))

    assert torch.autograd.gradcheck(both, (off, on), **fast)
    assert torch.autograd.gradcheck(lambda off: echo_distillation(off, on.detach(), labels, **free).loss, off, **fast)
    assert torch.autograd.gradcheck(
        lambda on: echo_distillation(off.detach(), on, labels, kd_detach="off", **free).loss, on, **fast
    )


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)), (2.0, None)])
def test_direction_of_the_kl(tau, expected, backend):
    """KL(on || off) of (0.9, 0.1) and (0.5, 0.5); at tau 2 the teacher is (3, 1) / 4 and the factor 4."""
    on, off = (torch.tensor([[row] * 2], dtype=torch.float64).log() for row in ([0.9, 0.1], [0.5, 0.5]))
    expected = expected or 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    labels = torch.tensor([[-100, 0]])
    result = echo_distillation(off, on, labels, temperature=tau, backend=backend)
    assert result.loss_kd.item() == pytest.approx(expected, rel=1e-12)
    swapped = echo_distillation(on, off, labels, temperature=tau, backend=backend).loss_kd.item()
    assert abs(swapped - expected) > 0.05


def test_equal_branches_have_no_divergence(backend):
    off, _, labels = problem()
    result = echo_distillation(off, off.detach().clone(), labels, backend=backend)
    assert abs(result.loss_kd.item()) < 1e-14
    assert gradients(result.loss_kd, off)[0].abs().max() < 1e-14


def test_positions_outside_q_do_not_count(backend):
    """Not even when their logits are NaN; their gradient is exactly zero."""
    off, on, labels = problem()
    outside = torch.ones(3, 5, dtype=torch.bool)
    for n, t in Q:
        outside[n, t] = False
    expected = echo_distillation(off, on, labels, kd_detach="none", backend=backend)
    spoiled = [t.detach().masked_fill(outside[..., None], float("nan")).requires_grad_() for t in (off, on)]
    result = echo_distillation(*spoiled, labels, kd_detach="none", backend=backend)
    assert_near(torch.stack(result), torch.stack(expected))
    for ours, theirs in zip(gradients(result.loss, *spoiled), gradients(expected.loss, off, on), strict=True):
        assert not ours[outside].any()
        assert_near(ours, theirs)


def test_unrouted_step(backend):
    off, on, labels = problem()
    result = echo_distillation(off, None, labels, backend=backend)
    assert result.loss_on is None and result.loss_kd is None
    assert_near(result.loss, result.loss_off)
    assert_near(result.loss, loops(off, on, labels)[0])
    assert_near(gradients(result.loss, off)[0], gradients(loops(off, on, labels)[0], off)[0])


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_num_items_divides_the_sums(kind, backend):
    off, on, labels = problem()
    result = echo_distillation(off, on, labels, num_items=kind(40), backend=backend)
    expected = loops(off, on, labels, divisor=40)
    assert_near(torch.stack(result[1:]), torch.stack(expected))
    assert_near(result.loss, sum(expected))


def test_micro_batches_add_up(backend):
    off, on, labels = problem()
    whole = echo_distillation(off, on, labels, backend=backend)
    parts = [
        echo_distillation(off[rows], on[rows], labels[rows], num_items=len(Q), backend=backend)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert_near(torch.stack(parts[0]) + torch.stack(parts[1]), torch.stack(whole))


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("num_items", [None, 3, 0])
@pytest.mark.parametrize("labels", [[[-100] * 4] * 2, [[2, -100, -100, -100]] * 2, [[2]] * 2, []])
def test_empty_q_gives_zero_and_zero_gradients(labels, routed, num_items, backend):
    """No label, a label at position 0 only, a single position, no sample."""
    labels = torch.tensor(labels, dtype=torch.int64).reshape(len(labels), -1 if labels else 4)
    off, on = (torch.randn(*labels.shape, 6).double().requires_grad_() for _ in range(2))
    result = echo_distillation(off, on if routed else None, labels, num_items=num_items, backend=backend)
    assert all(part.item() == 0 for part in result if part is not None)
    result.loss.backward()
    for tensor in (off, on) if routed else (off,):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_bfloat16_logits_are_upcast(backend):
    if backend != "reference" and (reason := why_not(backend, torch.bfloat16)):
        pytest.skip(reason)
    off, on, labels = problem(torch.bfloat16)
    result = echo_distillation(off, on, labels, kd_detach="none", backend=backend)
    assert {part.dtype for part in result} == {torch.float32}
    wide = [t.detach().double().requires_grad_() for t in (off, on)]
    expected = loops(*wide, labels)
    torch.testing.assert_close(torch.stack(result[1:]).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(result.loss, off, on), gradients(sum(expected), *wide), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=1e-6)


def test_large_logits_stay_finite(backend):
    off, on, labels = problem(torch.float32)
    result = echo_distillation(off * 1e4, on * -1e4, labels, kd_detach="none", backend=backend)
    assert torch.stack(result).isfinite().all()
    assert all(g.isfinite().all() for g in gradients(result.loss, off, on))


BAD = {
    "logits_off 2-D": ({"logits_off": torch.zeros(5, 6)}, ValueError, "logits_off"),
    "logits_off dtype": ({"logits_off": torch.zeros(3, 5, 6, dtype=torch.int64)}, ValueError, "logits_off"),
    "logits_on shape": ({"logits_on": torch.zeros(3, 5, 7)}, ValueError, "logits_on"),
    "logits_on dtype": ({"logits_on": torch.zeros(3, 5, 6, dtype=torch.int64)}, (TypeError, ValueError), "logits_on"),
    "labels shape": ({"labels": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "labels"),
    "labels dtype": ({"labels": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "labels"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperature < 0": ({"temperature": -1.0}, ValueError, "temperature"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "temperature"),
    "kd_weight < 0": ({"kd_weight": -0.1}, ValueError, "kd_weight"),
    "kd_weight nan": ({"kd_weight": float("nan")}, ValueError, "kd_weight"),
    "num_items < 0": ({"num_items": -1}, ValueError, "num_items"),
    "kd_detach": ({"kd_detach": "teacher"}, ValueError, "kd_detach"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(changes, error, name, backend):
    off, on, labels = problem()
    with pytest.raises(error, match=f"^{name}: got .*wants"):
        echo_distillation(**{"logits_off": off, "logits_on": on, "labels": labels, "backend": backend, **changes})
