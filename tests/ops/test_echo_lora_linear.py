"""`functional.echo_lora_linear` against plain matrix algebra in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import why_not

from echolora_kernels import Echo
from echolora_kernels.functional import echo_lora_linear

BACKENDS = ["reference", "cpp"]  # which compute on the CPU, the update in the adapters' dtype; see also tests/backends
SITES = ["output", "adapter_input", "rank"]
GRADIENTS = ["x", "bias", "lora_a", "lora_b", "magnitude", "delta"]
S = 0.7

every_site = pytest.mark.parametrize("site", [None, *SITES])
lora_or_dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
bias_or_not = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    reason = None if request.param == "reference" else why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def problem(site="output", dora=True, bias=True, *, lead=(2, 5), d_in=6, d_out=4, rank=3, dtype=torch.float64):
    """Random tensors by argument name; delta and mask are None without a site."""
    width = {"output": d_out, "adapter_input": d_in, "rank": rank}.get(site)
    p = {
        "x": torch.randn(*lead, d_in, dtype=dtype),
        "weight": torch.randn(d_out, d_in, dtype=dtype),
        "bias": torch.randn(d_out, dtype=dtype) if bias else None,
        "lora_a": torch.randn(rank, d_in, dtype=dtype),
        "lora_b": torch.randn(d_out, rank, dtype=dtype),
        "magnitude": torch.rand(d_out, dtype=dtype) + 0.5 if dora else None,
        "delta": torch.randn(lead[0], width, dtype=dtype) if site else None,
    }
    p["mask"] = torch.rand(lead) < 0.6 if site else None
    return p


def run(p, site, backend, *, dropout_p=0.0):
    echo = Echo(p["delta"], p["mask"], site) if site else None
    base = (p["x"], p["weight"], p["bias"], p["lora_a"], p["lora_b"], S)
    return echo_lora_linear(*base, dropout_p=dropout_p, magnitude=p["magnitude"], echo=echo, backend=backend)


def row_norm(p):
    adapted = p["weight"] + S * p["lora_b"] @ p["lora_a"]
    return adapted.square().sum(1).sqrt().detach()


def formula(p, site, *, keep=None, norm=None):
    """y = x W0' + x~ (G V - W0)' + E C' + bias with V = W0 + s B A materialised, C what the site puts behind the echo.

    `keep` is the dropout mask with its 1 / (1 - p); `norm` the constant that the magnitude is divided by.
    """
    p = {name: t.double() if t is not None else None for name, t in p.items()}
    weight, update = p["weight"], S * p["lora_b"] @ p["lora_a"]
    gain = torch.ones(len(weight), 1, dtype=torch.float64)
    if p["magnitude"] is not None:
        gain = (p["magnitude"] / (row_norm(p) if norm is None else norm))[:, None]
    dropped = p["x"] if keep is None else p["x"] * keep
    y = p["x"] @ weight.T + dropped @ (gain * (weight + update) - weight).T
    if p["bias"] is not None:
        y = y + p["bias"]
    if site:
        behind = {"output": torch.eye(len(weight)).double(), "adapter_input": gain * update}
        behind["rank"] = gain * S * p["lora_b"]
        arrives = p["delta"] @ behind[site].T
        y = y + torch.einsum("nt,no->nto", p["mask"], arrives)
    return y


def with_gradients(p, names=GRADIENTS):
    """The same tensors as new leaves, and those of `names` that are there, requiring gradients."""
    leaves = {name: t.detach().clone() if t is not None else None for name, t in p.items()}
    wanted = {name: leaves[name].requires_grad_() for name in names if leaves[name] is not None}
    return leaves, wanted


def assert_same_gradients(p, site, backend, upstream=None, *, dropout_p=0.0, keep=None, rtol=1e-10):
    ours, ours_wanted = with_gradients(p)
    y = run(ours, site, backend, dropout_p=dropout_p)
    upstream = torch.randn_like(y) if upstream is None else upstream
    y.backward(upstream)
    theirs, theirs_wanted = with_gradients(p)
    formula(theirs, site, keep=keep).backward(upstream.double())
    for name, tensor in ours_wanted.items():
        expected = theirs_wanted[name].grad
        torch.testing.assert_close(tensor.grad, expected, rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}")


@every_site
@lora_or_dora
@bias_or_not
def test_values_and_gradients_match_the_formula(site, dora, bias, backend):
    p = problem(site, dora, bias)
    torch.testing.assert_close(run(p, site, backend), formula(p, site), rtol=1e-12, atol=1e-12)
    assert_same_gradients(p, site, backend)


@every_site
@lora_or_dora
@bias_or_not
def test_gradcheck(site, dora, bias, backend):
    """Our backward against finite differences of the formula whose DoRA norm is frozen at the starting point."""
    p = problem(site, dora, bias, lead=(2, 3), d_in=4, d_out=3, rank=2)
    norm = row_norm(p)
    leaves, wanted = with_gradients(p)

    class FrozenForwardOurBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return formula({**leaves, **dict(zip(wanted, inputs, strict=True))}, site, norm=norm)

        @staticmethod
        def backward(ctx, upstream):
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                y = run({**leaves, **dict(zip(wanted, inputs, strict=True))}, site, backend)
                return torch.autograd.grad(y, inputs, upstream)

    assert torch.autograd.gradcheck(FrozenForwardOurBackward.apply, tuple(wanted.values()))


def test_fast_dora_dropout_keeps_one_base_product(backend):
    """y = g (W0 x + s B A drop(x)) + bias, the gain on the whole base product; without dropout or DoRA nothing changes."""
    p = problem(None, dora=True)
    base = (p["x"], p["weight"], p["bias"], p["lora_a"], p["lora_b"], S)

    def run_with(mode, dropout_p=0.5, magnitude=p["magnitude"]):
        torch.manual_seed(3)
        return echo_lora_linear(*base, dropout_p=dropout_p, magnitude=magnitude, dora_dropout=mode, backend=backend)

    kept = extracted_keep(p["x"].shape[:-1], 6, 0.5, 3, backend)
    gain = p["magnitude"] / row_norm(p)
    update = S * (p["x"] * kept) @ p["lora_a"].T @ p["lora_b"].T
    torch.testing.assert_close(run_with("fast"), gain * (p["x"] @ p["weight"].T + update) + p["bias"])
    assert not torch.allclose(run_with("fast"), run_with("exact"))
    assert torch.equal(run_with("fast", 0.0), run_with("exact", 0.0))
    assert torch.equal(run_with("fast", magnitude=None), run_with("exact", magnitude=None))
    with pytest.raises(ValueError, match=r"dora_dropout: got 'quick', wants one of 'exact', 'fast'"):
        run_with("quick")


@lora_or_dora
@pytest.mark.parametrize("name", GRADIENTS)
def test_one_gradient_alone_is_the_same(name, dora, backend):
    """Whatever the others require; what requires none gets none."""
    p = problem("rank", dora, True)
    if p[name] is None:
        p["magnitude"], name = None, "lora_b"
    together, wanted = with_gradients(p)
    run(together, "rank", backend).square().sum().backward()
    alone, only = with_gradients(p, [name])
    run(alone, "rank", backend).square().sum().backward()
    torch.testing.assert_close(only[name].grad, wanted[name].grad, rtol=1e-12, atol=1e-12)
    assert all(t is None or t.grad is None for other, t in alone.items() if other != name)


def extracted_keep(shape, width, dropout_p, seed, backend):
    """The mask a seed gives: with W0 = 0, A = B = I and x = 1 the output is the dropped input."""
    eye, zero = torch.eye(width).double(), torch.zeros(width, width).double()
    torch.manual_seed(seed)
    ones = torch.ones(*shape, width).double()
    return echo_lora_linear(ones, zero, None, eye, eye, 1.0, dropout_p=dropout_p, backend=backend)


@every_site
@lora_or_dora
def test_dropout_is_the_formula_with_its_mask(site, dora, backend):
    p = problem(site, dora, True, lead=(3, 5), d_in=8, d_out=8, rank=8)
    keep = extracted_keep((3, 5), 8, 0.4, seed=11, backend=backend)
    kept = keep != 0
    torch.testing.assert_close(keep[kept], torch.full_like(keep[kept], 1 / 0.6))
    assert 0.4 < kept.double().mean() < 0.8
    torch.manual_seed(11)
    torch.testing.assert_close(
        run(p, site, backend, dropout_p=0.4), formula(p, site, keep=keep), rtol=1e-12, atol=1e-12
    )
    upstream = torch.randn(3, 5, 8).double()
    torch.manual_seed(11)
    assert_same_gradients(p, site, backend, upstream, dropout_p=0.4, keep=keep)


@lora_or_dora
def test_dropout_keeps_the_expectation(dora, backend):
    p = problem(None, dora, True, lead=(1,))
    expected = formula(p, None)
    p["x"] = p["x"].expand(40_000, -1)
    y = run(p, None, backend, dropout_p=0.3)
    error = (y.mean(0) - expected[0]).abs()
    assert (y.std(0) > 0.05).all()
    assert (error < 5 * y.std(0) / 200).all()  # five standard errors of the mean


def test_dropout_draws_anew_and_only_when_asked(backend):
    p = problem()
    first = run(p, "output", backend, dropout_p=0.5)
    assert not torch.equal(first, run(p, "output", backend, dropout_p=0.5))
    state = torch.get_rng_state()
    run(p, "output", backend)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("site", SITES)
@lora_or_dora
def test_float32_adapters_on_a_bfloat16_layer(site, dora, backend):
    p = problem(site, dora, True, lead=(4, 16), d_in=32, d_out=24, rank=8, dtype=torch.float32)
    p |= {name: p[name].bfloat16() for name in ("x", "weight", "bias")}
    expected = formula(p, site)
    leaves, wanted = with_gradients(p)
    y = run(leaves, site, backend)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 2**-7 * expected.abs().max()
    y.sum().backward()
    assert {name: t.grad.dtype for name, t in wanted.items()} == {name: t.dtype for name, t in wanted.items()}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_update_is_computed_in_the_adapters_dtype(dropout_p, backend):
    """Dropout too: without W0, only the last rounding to bfloat16 is left."""
    p = problem("rank", False, False, lead=(4, 16), d_in=32, d_out=32, rank=32, dtype=torch.float32)
    p["x"], p["weight"] = p["x"].bfloat16(), torch.zeros(32, 32).bfloat16()
    keep = extracted_keep((4, 16), 32, dropout_p, seed=7, backend=backend)
    torch.manual_seed(7)
    y = run(p, "rank", backend, dropout_p=dropout_p)
    torch.testing.assert_close(y.double(), formula(p, "rank", keep=keep), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES)
@lora_or_dora
def test_autocast(site, dora, x_dtype, backend):
    p = problem(site, dora, True, lead=(4, 16), d_in=32, d_out=24, rank=8, dtype=torch.float32)
    p["x"] = p["x"].to(x_dtype)
    expected = formula(p, site)
    leaves, wanted = with_gradients(p)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(leaves, site, backend)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 2**-6 * expected.abs().max()
    y.sum().backward()
    reference, reference_wanted = with_gradients(p)
    formula(reference, site).sum().backward()
    for name, tensor in wanted.items():
        grad, exact = tensor.grad.double(), reference_wanted[name].grad.double()
        assert tensor.grad.dtype == tensor.dtype
        assert (grad - exact).norm() < 2**-5 * exact.norm(), name


@every_site
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_input_is_modified(site, dropout_p, backend):
    p = problem(site)
    leaves, wanted = with_gradients(p)
    y = run(leaves, site, backend, dropout_p=dropout_p)
    y.sum().backward()
    for name, tensor in leaves.items():
        if tensor is not None:
            assert torch.equal(tensor, p[name]), name
            assert tensor._version == 0, name
    assert all(t.grad is not None for t in wanted.values())


@every_site
@lora_or_dora
def test_upstream_gradient_of_any_layout(site, dora, backend):
    """Expanded (from .sum()), and transposed."""
    p = problem(site, dora, True)
    assert_same_gradients(p, site, backend, torch.ones(1).double().expand(2, 5, 4))
    assert_same_gradients(p, site, backend, torch.randn(4, 5, 2).double().permute(2, 1, 0))


@every_site
@lora_or_dora
def test_inputs_of_any_layout(site, dora, backend):
    p = problem(site, dora, True)
    expected = run(p, site, backend)
    strided = dict(p)
    strided["x"] = p["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("weight", "lora_a", "lora_b"):
        strided[name] = p[name].T.contiguous().T
    if site:
        strided["delta"] = p["delta"].repeat_interleave(2, dim=1)[:, ::2]
        strided["mask"] = p["mask"].T.contiguous().T
    assert not any(strided[name].is_contiguous() for name in ("x", "weight", "lora_a", "lora_b"))
    torch.testing.assert_close(run(strided, site, backend), expected, rtol=1e-12, atol=1e-12)
    strided["x"] = p["x"][:1].expand(2, 5, 6)
    p["x"] = strided["x"].clone()
    torch.testing.assert_close(run(strided, site, backend), run(p, site, backend), rtol=1e-12, atol=1e-12)


def test_a_weighted_mask_scales_the_echo(backend):
    p = problem("adapter_input")
    p["mask"] = torch.rand(2, 5).double()
    torch.testing.assert_close(run(p, "adapter_input", backend), formula(p, "adapter_input"), rtol=1e-12, atol=1e-12)


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5)),
    site=st.sampled_from([None, *SITES]),
    dora=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(backend, lead, sizes, site, dora, bias):
    """From 1-D x to three leading dimensions, empty ones too; an echo where x is [N, T, d_in]."""
    site = site if len(lead) == 2 else None
    d_in, d_out, rank = sizes
    p = problem(site, dora, bias, lead=tuple(lead), d_in=d_in, d_out=d_out, rank=rank)
    y = run(p, site, backend)
    assert y.shape == (*lead, d_out)
    torch.testing.assert_close(y, formula(p, site), rtol=1e-10, atol=1e-10)
    assert_same_gradients(p, site, backend, rtol=1e-9)


def meta(*shape):
    return torch.zeros(*shape, dtype=torch.float64, device="meta")


BAD = {
    "weight 1-D": ({"weight": torch.zeros(6).double()}, ValueError, "weight"),
    "weight device": ({"weight": meta(4, 6)}, ValueError, "weight"),
    "x 0-D": ({"x": torch.zeros(()).double()}, ValueError, "x"),
    "x width": ({"x": torch.zeros(2, 5, 7).double()}, ValueError, "x"),
    "integers": ({"x": torch.ones(2, 5, 6).long(), "weight": torch.ones(4, 6).long()}, TypeError, "(x|weight)"),
    "x dtype": ({"x": torch.zeros(2, 5, 6)}, TypeError, "x"),
    "lora_a 1-D": ({"lora_a": torch.zeros(6).double()}, ValueError, "lora_a"),
    "lora_a rank 0": ({"lora_a": torch.zeros(0, 6).double()}, ValueError, "lora_a"),
    "lora_a width": ({"lora_a": torch.zeros(3, 7).double()}, ValueError, "lora_a"),
    "lora_a device": ({"lora_a": meta(3, 6)}, ValueError, "lora_a"),
    "lora_b shape": ({"lora_b": torch.zeros(3, 4).double()}, ValueError, "lora_b"),
    "lora_b dtype": ({"lora_b": torch.zeros(4, 3)}, TypeError, "lora_b"),
    "lora_b device": ({"lora_b": meta(4, 3)}, ValueError, "lora_b"),
    "bias shape": ({"bias": torch.zeros(5).double()}, ValueError, "bias"),
    "bias dtype": ({"bias": torch.zeros(4)}, TypeError, "bias"),
    "bias device": ({"bias": meta(4)}, ValueError, "bias"),
    "magnitude shape": ({"magnitude": torch.zeros(4, 1).double()}, ValueError, "magnitude"),
    "magnitude device": ({"magnitude": meta(4)}, ValueError, "magnitude"),
    "mask length": ({"mask": torch.ones(2, 4)}, ValueError, r"echo\.mask"),
    "echo on 2-D x": ({"x": torch.zeros(5, 6).double()}, ValueError, "x"),
    "echo device": ({"delta": meta(2, 4), "mask": meta(2, 5)}, ValueError, r"echo\.delta"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_tensors(changes, error, name, backend):
    with pytest.raises(error, match=f"^{name}: got .*wants"):
        run({**problem(), **changes}, "output", backend)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_dropout(p, backend):
    with pytest.raises(ValueError, match=r"^dropout_p: got .*wants"):
        run(problem(), "output", backend, dropout_p=p)


@pytest.mark.parametrize("site", SITES)
def test_bad_echo_width(site, backend):
    p = {**problem(site), "delta": torch.zeros(2, 9).double()}
    with pytest.raises(ValueError, match=r"^echo\.delta: got width 9, wants"):
        run(p, site, backend)


BAD_ECHO = {
    "delta list": ({"delta": [[0.0]]}, TypeError, r"echo\.delta"),
    "delta 1-D": ({"delta": torch.zeros(2)}, ValueError, r"echo\.delta"),
    "delta dtype": ({"delta": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, r"echo\.delta"),
    "mask None": ({"mask": None}, TypeError, r"echo\.mask"),
    "mask 3-D": ({"mask": torch.ones(2, 5, 1)}, ValueError, r"echo\.mask"),
    "mask dtype": ({"mask": torch.ones(2, 5, dtype=torch.int64)}, TypeError, r"echo\.mask"),
    "mask samples": ({"mask": torch.ones(3, 5)}, ValueError, r"echo\.mask"),
    "mask device": ({"mask": torch.ones(2, 5, device="meta")}, ValueError, r"echo\.mask"),
    "site": ({"site": "input"}, ValueError, r"echo\.site"),
}


@pytest.mark.parametrize(("changes", "error", "name"), BAD_ECHO.values(), ids=BAD_ECHO.keys())
def test_bad_echo(changes, error, name):
    with pytest.raises(error, match=f"^{name}: got .*wants"):
        Echo(**{"delta": torch.zeros(2, 4), "mask": torch.ones(2, 5), **changes})
