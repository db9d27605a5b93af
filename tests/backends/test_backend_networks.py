"""`echo_networks` on every backend that has it, the reference too."""

import math
from dataclasses import replace

import pytest
import torch
from linear_cases import assert_equal_up_to_rounding, device_for, why_not
from network_cases import NAMES, make

from echolora_kernels import BackendUnavailable
from echolora_kernels.functional import echo_networks
from echolora_kernels.ops.echo_networks import operators, passes

# a rest in every block: of samples, of rows of a module, of m and of d
SIZES = {
    "small": {},
    "one module": {"widths": (4,)},
    "28 modules": {"n": 4, "d": 24, "m": 8, "widths": (16, 5, 40, 3) * 7},
    "many samples": {"n": 35, "d": 19, "m": 16, "widths": (20, 3)},
    "wide": {"n": 2, "d": 300, "m": 100, "widths": (270, 37, 1)},
    "wide bottleneck": {"n": 2, "d": 9, "m": 256, "widths": (40, 17)},
}
EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def by_hand(case):
    """lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u)), one number at a time."""

    def dot(row, vector):
        return sum(a * b for a, b in zip(row, vector, strict=True))

    p = {name: tensor.tolist() for name, tensor in case.tensors().items()}
    m, start = case.proj_up.shape[1], 0
    for index, width in enumerate(case.widths):
        w1, u1 = (p["down"][(2 * index + half) * m :][:m] for half in (0, 1))
        delta = []
        for state in p["u"]:
            hidden, gate_hidden = ([math.tanh(dot(row, state)) for row in rows] for rows in (w1, u1))
            rows = list(zip(p["proj_up"], p["gate_up"], p["gate_bias"], strict=True))[start : start + width]
            gates = [1 / (1 + math.exp(-(dot(u2, gate_hidden) + c))) for _, u2, c in rows]
            delta.append([p["scale"][index] * g * dot(w2, hidden) for g, (w2, _, _) in zip(gates, rows, strict=True)])
        yield torch.tensor(delta, dtype=torch.float64)
        start += width


def test_formula(networks_backend):
    case = make(networks_backend)
    for delta, want in zip(case.call(networks_backend), by_hand(case), strict=True):
        torch.testing.assert_close(delta.cpu(), want, rtol=1e-12, atol=1e-13)


@EVERY_SIZE
def test_values_and_gradients(networks_backend, sizes):
    case = make(networks_backend, **sizes)
    got = case.results(networks_backend)
    assert_equal_up_to_rounding(got, case.results("reference"))
    assert all(got[f"delta {i}"].is_contiguous() for i in range(len(case.widths)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["small", "many samples", "wide", "wide bottleneck"])
def test_as_exact_as_torch(networks_backend, name, dtype):
    """Largest and rms error, each the mean of many draws: two lambdas' error is a matter of luck in a single one."""
    if networks_backend != "reference" and (reason := why_not(networks_backend, dtype)):
        pytest.skip(reason)
    errors = {}
    for seed in range(12 if networks_backend == "triton" and name != "small" else 60):
        torch.manual_seed(seed)
        case = make(networks_backend, dtype=dtype, **SIZES[name])
        ours, torchs = case.results(networks_backend), case.results("reference")
        for key, exact in case.map(torch.Tensor.double).results("reference").items():
            floor = 0.5 * torch.finfo(dtype).eps * exact.abs().max()  # what rounding the result costs
            pair = [(each[key].double() - exact).abs() for each in (ours, torchs)]
            measures = [torch.stack((error.max(), error.square().mean().sqrt())) for error in pair]
            errors.setdefault(key, []).append((*measures, torch.stack((floor, floor / 4))))
    above = {}
    for key, drawn in errors.items():
        ours, torchs, floor = (torch.stack(each).mean(0) for each in zip(*drawn, strict=True))
        ratio = ours / torch.maximum(torchs, floor)
        if ratio.max() > 1.5:
            above[key] = ratio.tolist()
    assert not above


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_sigmoid_on_a_grid(networks_backend, dtype):
    """Each relative to its own value, from numbers that are next to nothing to those that saturate."""
    if networks_backend == "reference":
        pytest.skip("these are torch's")
    size = torch.logspace(-30, 2, 500, dtype=dtype, device=device_for(networks_backend))
    x = torch.cat([-size, size, size.new_tensor([0.0, 0.625, -0.625])])
    one = x.new_ones(1, 1)
    # H is tanh(x); with W1 = W2 = 1 and U2 = 0, Delta is sigmoid(c) tanh(x)
    _, h = passes.load(networks_backend).forward(x[:, None], x.new_ones(2, 1), one, one, one[0], one[0], [1])
    eps = torch.finfo(dtype).eps
    assert ((h[:, 0] - x.double().tanh()).abs() <= 2 * eps * x.double().tanh().abs()).all()
    down, up = torch.tensor([[50.0], [0.0]], dtype=dtype, device=x.device), x.new_ones(len(x), 1)
    arguments = (down, up, 0 * up, x, one[0], [len(x)])
    delta, _ = passes.load(networks_backend).forward(one, *arguments)
    want = x.double().sigmoid()
    assert ((delta - want).abs() <= 4 * eps * want + 1e-37).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_comes_through(networks_backend, name, value):
    """Where torch's results are NaN or infinite ours are not finite either, and nowhere else."""
    case = make(networks_backend)
    getattr(case, name).view(-1)[1] = value
    got, want = case.results(networks_backend), case.results("reference")
    for key, expected in want.items():
        assert torch.equal(got[key].isfinite(), expected.isfinite()), key


def test_gradcheck(networks_backend):
    case = make(networks_backend)
    leaves = [tensor.requires_grad_() for tensor in case.tensors().values()]
    assert torch.autograd.gradcheck(lambda *t: echo_networks(*t, case.widths, backend=networks_backend), leaves)


@pytest.mark.parametrize("needs", [NAMES[1:], ("u",), ("down",), ("gate_bias", "scale")], ids=str)
def test_only_some_gradients(networks_backend, needs):
    case = make(networks_backend)
    everything, some = case.results(networks_backend), case.results(networks_backend, needs)
    assert all(torch.equal(everything[name], value) for name, value in some.items())


def fenced(tensor):
    """The same values with NaN all round, between rows and between columns."""
    room = tensor.new_full([2 * size + 2 for size in tensor.shape], math.nan)
    return room[tuple(slice(1, -1, 2) for _ in tensor.shape)].copy_(tensor)


def test_any_strides_and_nan_around_every_argument(networks_backend):
    case = make(networks_backend, **SIZES["28 modules"])
    assert_equal_up_to_rounding(case.map(fenced).results(networks_backend), case.results(networks_backend))


def test_incoming_gradients_of_any_strides(networks_backend):
    case = make(networks_backend)
    one = torch.ones((), dtype=torch.float64, device=case.u.device)
    gradients = (one.expand(3, 4), case.ddelta[1][:1].expand(3, 7)), tuple(g.t().contiguous().t() for g in case.ddelta)
    for ddelta in gradients:
        this = replace(case, ddelta=ddelta)
        assert_equal_up_to_rounding(this.results(networks_backend), this.results("reference"))


def test_one_of_the_deltas_alone(networks_backend):
    case = make(networks_backend)
    leaves = [tensor.requires_grad_() for tensor in case.tensors().values()]
    found = [
        torch.autograd.grad(case.call(backend)[1], leaves, case.ddelta[1])
        for backend in (networks_backend, "reference")
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_arguments_are_unchanged_and_a_second_backward_gives_the_same(networks_backend):
    case = make(networks_backend, **SIZES["many samples"])
    leaves = [tensor.requires_grad_() for tensor in case.tensors().values()]
    before = [tensor.detach().clone() for tensor in (*leaves, *case.ddelta)]
    deltas = case.call(networks_backend)
    first = torch.autograd.grad(deltas, leaves, case.ddelta, retain_graph=True)
    second = torch.autograd.grad(deltas, leaves, case.ddelta)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.detach(), b) for a, b in zip((*leaves, *case.ddelta), before, strict=True))


def test_nothing_is_read_that_was_not_written(networks_backend):
    """Workspaces and results that begin as NaN give the same bits."""
    case = make(networks_backend, **SIZES["wide"])
    found = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        try:
            found.append(case.results(networks_backend))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_empty_batch(networks_backend):
    case = make(networks_backend, n=0)
    results = case.results(networks_backend)
    assert [tuple(results[f"delta {i}"].shape) for i in (0, 1)] == [(0, 4), (0, 7)]
    for name, tensor in case.tensors().items():
        assert results[name].shape == tensor.shape and not results[name].any(), name


@pytest.mark.parametrize(
    ("zero", "without"),
    [
        (["proj_up", "gate_up"], {"w1", "u1", "gate_up", "gate_bias", "scale"}),
        (["gate_up"], {"u1"}),
        (["down", "proj_up", "gate_up"], {"w1", "u1", "proj_up", "gate_up", "gate_bias", "scale"}),
        ([], set()),
    ],
    ids=["initial values", "once W2 moved", "the trap of a zero W1", "once U2 moved"],
)
def test_who_has_a_gradient(zero, without, networks_backend):
    case = make(networks_backend)
    case = replace(case, **{name: torch.zeros_like(getattr(case, name)) for name in zero})
    gradients = case.results(networks_backend, NAMES[1:])
    halves = gradients.pop("down").unflatten(0, (2, 2, 3))
    gradients |= {"w1": halves[:, 0], "u1": halves[:, 1]}
    assert {name for name in ("w1", "u1", *NAMES[2:]) if not gradients[name].any()} == without


def test_autocast_changes_nothing(networks_backend):
    """Values and gradients in float32: its steps are too small for less, and the products are tiny."""
    case = make(networks_backend, dtype=torch.float32)
    want = case.results(networks_backend)
    leaves = [tensor.requires_grad_() for tensor in case.tensors().values()]
    with torch.autocast(case.u.device.type, torch.bfloat16):
        deltas = case.call(networks_backend)
    gradients = torch.autograd.grad(deltas, leaves, case.ddelta)
    assert all(torch.equal(got, value) for got, value in zip((*deltas, *gradients), want.values(), strict=True))


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
def test_one_graph_equals_eager(networks_backend, how):
    if networks_backend == "triton" and how == "inductor" and device_for("triton").type == "cpu":
        pytest.skip("the interpreter's kernels are no different from what aot_eager calls")
    torch.compiler.reset()
    compiled = torch.compile(lambda case: case.call(networks_backend), fullgraph=True, backend=how, dynamic=True)
    for n in (3, 5):
        case = make(networks_backend, n=n)
        want = case.results(networks_backend)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
        deltas = compiled(replace(case, **leaves))
        gradients = torch.autograd.grad(deltas, list(leaves.values()), case.ddelta)
        got = {f"delta {i}": delta.detach() for i, delta in enumerate(deltas)}
        assert_equal_up_to_rounding(got | dict(zip(NAMES, gradients, strict=True)), want)


def test_chosen_by_itself_under_transforms():
    """vmap has no rule for kernels: the reference runs."""
    case = make("cpp")
    rows = torch.vmap(lambda u: replace(case, u=u[None]).call(None)[0][0])(case.u)
    torch.testing.assert_close(rows, case.call("reference")[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_operators_pass_opcheck(networks_backend, dtype):
    if networks_backend == "reference":
        pytest.skip("it registers none")
    case = make(networks_backend, dtype=dtype)
    tensors = [tensor.requires_grad_() for tensor in case.tensors().values()]
    torch.library.opcheck(operators.forward_operator, (*tensors, list(case.widths), networks_backend))


CHANGES = {
    "u": lambda t: t[0],
    "down": lambda t: t[1:],
    "proj_up": lambda t: t[1:],
    "gate_up": lambda t: t[:, 1:],
    "gate_bias": lambda t: t[1:],
    "scale": lambda t: t[0],
}


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_named(networks_backend, name):
    case = make(networks_backend)
    for error, changed in ((ValueError, CHANGES[name]), (TypeError, torch.Tensor.float), (ValueError, _to_meta)):
        with pytest.raises(error, match=rf"^(u, )?(\w+): got (dtype|shapes?|device) .*wants|{name}"):
            replace(case, **{name: changed(getattr(case, name))}).call(networks_backend)


def _to_meta(tensor):
    return tensor.to("meta")


@pytest.mark.parametrize("widths", [(), (4, 0), (4, -1)])
def test_bad_widths(networks_backend, widths):
    with pytest.raises(ValueError, match=r"^widths: got .*wants"):
        replace(make(networks_backend), widths=widths).call(networks_backend)


def test_a_bottleneck_beyond_the_kernels():
    if reason := why_not("triton"):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"^proj_up: got m = 257, wants at most 256 on the triton backend"):
        make("triton", m=257).call("triton")


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_another_device(backend):
    if reason := why_not(backend):
        pytest.skip(reason)
    with pytest.raises(BackendUnavailable, match="got device meta"):
        make(backend).map(_to_meta).call(backend)
