"""Each kernel of a backend against its formula, as `Kernels` states it."""

import pytest
import torch
from linear_cases import device_for, why_not

from echolora_kernels.ops.dora_norm import reference as norm_reference
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout
from echolora_kernels.ops.echo_lora_linear.kernels import load
from echolora_kernels.ops.echo_lora_linear.projection import Projection

N, T, D_IN, D_OUT, R = 3, 37, 71, 83, 20
S = 0.7
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@pytest.fixture
def kernels(backend):
    return load(backend)


@pytest.fixture
def draw(device):
    return lambda *shape: torch.randn(shape, dtype=torch.float64, device=device)


@pytest.fixture
def mask(device):
    return torch.rand(N, T, device=device) < 0.5


@pytest.fixture(params=["none", "exact", "fast"])
def dropout(request, device):
    return Dropout() if request.param == "none" else Dropout.draw(0.4, device, request.param)


def keep(backend, dropout, width=D_IN):
    """The scaled keep-mask, by A = identity."""
    eye = torch.eye(width, dtype=torch.float64, device=device_for(backend))
    ones = eye.new_ones(N, T, width)
    return load(backend).shrink(ones, eye, 1.0, dropout=dropout).view(N, T, width)


@pytest.mark.parametrize("site", ["none", "adapter_input", "rank"])
def test_shrink(backend, kernels, draw, mask, dropout, site):
    x, a, delta = draw(N, T, D_IN), draw(R, D_IN), draw(N, R if site == "rank" else D_IN)
    echo = {} if site == "none" else {"site": site, "delta": delta, "mask": mask}
    got = kernels.shrink(x, a, S, dropout=dropout, **echo)
    spread = mask[..., None] * delta[:, None]
    x = x * keep(backend, dropout)
    want = (x + spread) @ a.T if site == "adapter_input" else x @ a.T + (spread if site == "rank" else 0)
    close(got.view(N, T, R), S * want)


def test_shrink_with_a_gain_on_the_columns(kernels, draw):
    x, a, gain = draw(N, T, D_IN), draw(R, D_IN), draw(D_IN)
    close(kernels.shrink(x, a, S, dropout=Dropout(), gain=gain), S * (x @ (a * gain).T).view(N * T, R))


def test_nothing_dropped_is_one_and_the_rest_is_scaled(backend, device):
    assert (keep(backend, Dropout()) == 1).all()
    kept = keep(backend, Dropout.draw(0.4, device))
    close(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / 0.6))


@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_the_dtype_of_s(backend, kernels, draw, x_dtype, lora_dtype):
    if reason := why_not(backend, x_dtype) or why_not(backend, lora_dtype):
        pytest.skip(reason)
    s = kernels.shrink(draw(N, T, D_IN).to(x_dtype), draw(R, D_IN).to(lora_dtype), S, dropout=Dropout())
    assert s.dtype == kernels.s_dtype(x_dtype, lora_dtype) and s.shape == (N * T, R) and s.stride(1) == 1


NEEDS = ("need_ds", "need_lora_b", "need_bias", "need_gain", "need_delta")


def product_of(kernels, draw, s, b):
    """x W0^T + S B^T, and what the backend keeps of it for the backward pass."""
    x, w, nothing = draw(N, T, D_IN), draw(D_OUT, D_IN), dict.fromkeys(("bias", "gain", "delta", "mask"))
    shape = (N * T, D_OUT)
    return kernels.linear_product(x, w, s, b, dropout=Dropout(), store_z=True, shape=shape, **nothing)


@pytest.mark.parametrize("dora", [False, True])
def test_linear_product(backend, kernels, draw, mask, dropout, dora):
    x, w, wide_s, b = draw(N, T, D_IN), draw(D_OUT, D_IN), draw(N * T, R + 3), draw(D_OUT, R)
    bias, delta, gain = draw(D_OUT), draw(N, D_OUT), draw(D_OUT) if dora else None
    s = wide_s[:, 2 : R + 2]
    got, z = kernels.linear_product(
        x, w, s, b, bias=bias, gain=gain, delta=delta, mask=mask, dropout=dropout, store_z=True, shape=(N, T, D_OUT)
    )
    dy = draw(N, T, D_OUT)
    needs = {**dict.fromkeys(NEEDS, False), "need_gain": True}
    sums = kernels.adapter_backward(dy, s, b, S, gain=gain, z=z, mask=None, **needs)
    twice = dora and dropout.dora == "exact" and dropout.p > 0
    kept = x * keep(backend, dropout) if twice else x
    inner = kept @ w.T + (s @ b.T).view(N, T, D_OUT)
    close(sums.gain, (dy * inner).sum((0, 1)))
    want = (x - kept) @ w.T + inner * (gain if dora else 1) + bias + mask[..., None] * delta[:, None]
    assert got.shape == (N, T, D_OUT) and got._base is None
    close(got, want)


def test_linear_product_alone(kernels, draw):
    x, w, s, b = draw(N, T, D_IN), draw(D_OUT, D_IN), draw(N * T, R), draw(D_OUT, R)
    nothing = dict.fromkeys(("bias", "gain", "delta", "mask"))
    got, z = kernels.linear_product(x, w, s, b, dropout=Dropout(), store_z=False, shape=(N * T, D_OUT), **nothing)
    assert z is None
    close(got, (x @ w.T).view(N * T, D_OUT) + s @ b.T)


@pytest.mark.parametrize("rank", [R, 100])
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_backward(kernels, draw, mask, dora, rank):
    dy, s, b = draw(N, T, D_OUT), draw(N * T, rank), draw(D_OUT, rank)
    gain = draw(D_OUT) if dora else None
    whole, z = product_of(kernels, draw, s, b)
    got = kernels.adapter_backward(dy, s, b, S, gain=gain, z=z, mask=mask, **dict.fromkeys(NEEDS, True))
    flat = dy.view(N * T, D_OUT)
    scaled = flat * gain if dora else flat
    close(got.ds, S * scaled @ b)
    assert got.ds.is_contiguous()
    close(got.lora_b, scaled.T @ s)
    close(got.bias, flat.sum(0))
    close(got.gain, (flat * whole).sum(0))
    close(got.delta, (mask[..., None] * dy).sum(1))


@pytest.mark.parametrize("need", NEEDS)
def test_adapter_backward_yields_only_what_is_needed(kernels, draw, mask, need):
    dy, s, b, z = draw(N, T, D_OUT), draw(N * T, R), draw(D_OUT, R), draw(N * T, D_OUT)
    needs = {name: name == need for name in NEEDS}
    s, z = s if need in ("need_lora_b", "need_gain") else None, z if need == "need_gain" else None
    mask = mask if need == "need_delta" else None
    got = kernels.adapter_backward(dy, s, b, S, gain=None, z=z, mask=mask, **needs)
    assert {f"need_{name}": value is not None for name, value in vars(got).items()} == needs


@pytest.mark.parametrize("echo", [False, True])
def test_lora_a_backward(backend, kernels, draw, mask, dropout, echo):
    x, ds, delta = draw(N, T, D_IN), draw(N * T, R), draw(N, D_IN)
    site = {"delta": delta, "mask": mask} if echo else {}
    got = kernels.lora_a_backward(x, ds, dropout=dropout, dtype=torch.float64, **site)
    x = x * keep(backend, dropout) + (mask[..., None] * delta[:, None] if echo else 0)
    close(got, ds.T @ x.reshape(-1, D_IN))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lora_a_backward_takes_ds_as_it_is_summed(kernels, draw, dtype):
    x, s, b, dy = draw(N, T, D_IN).to(dtype), draw(N * T, R).to(dtype), draw(D_OUT, R), draw(N, T, D_OUT).to(dtype)
    needs = {name: name == "need_ds" for name in NEEDS}
    ds = kernels.adapter_backward(dy, s, b.to(dtype), S, gain=None, z=None, mask=None, **needs).ds
    for out in (dtype, torch.float32):
        got = kernels.lora_a_backward(x, ds, dropout=Dropout(), dtype=out)
        want = ds.double().T @ x.double().reshape(-1, D_IN)
        assert got.dtype == out
        assert (got.double() - want).abs().max() < 8 * torch.finfo(dtype).eps * want.abs().max()


def dx(backend, dy, w, ds, a, gain, dropout):
    """B3 by its formula, [N, T, D_IN]."""
    low = (ds @ a).view(N, T, D_IN)
    if gain is not None and dropout.on_base:
        return dy @ w + keep(backend, dropout) * (low + (dy * (gain - 1)) @ w)
    return (dy if gain is None else dy * gain) @ w + keep(backend, dropout) * low


@pytest.mark.parametrize("dora", [False, True])
def test_input_product(backend, kernels, draw, dropout, dora):
    dy, w, ds, a = draw(N, T, D_OUT), draw(D_OUT, D_IN), draw(N * T, R), draw(R, D_IN)
    gain = draw(D_OUT) if dora else None
    got = kernels.input_product(dy, w, ds, a, dropout=dropout, gain=gain)
    assert got.shape == (N * T, D_IN) and got.is_contiguous()
    close(got.view(N, T, D_IN), dx(backend, dy, w, ds, a, gain, dropout))


@pytest.mark.parametrize("dora", [(False, False), (True, True), (False, True)])
def test_group_input_product(backend, kernels, draw, dropout, dora):
    widths, ranks = (D_OUT, 50), (R, 5)
    dys, ds = [draw(N, T, width) for width in widths], [draw(N * T, r) for r in ranks]
    gains = [draw(width) if d else None for width, d in zip(widths, dora, strict=True)]
    group = [
        Projection(draw(width, D_IN), None, draw(r, D_IN), draw(width, r), S)
        for width, r in zip(widths, ranks, strict=True)
    ]
    got = kernels.group_input_product(dys, group, ds, torch.cat(ds, 1), gains=gains, dropout=dropout)
    want = sum(
        dx(backend, dy, p.weight, d, p.lora_a, gain, dropout)
        for dy, p, d, gain in zip(dys, group, ds, gains, strict=True)
    )
    assert got.shape == (N * T, D_IN) and got.is_contiguous()
    close(got.view(N, T, D_IN), want)


@pytest.mark.parametrize("r", [1, R, 130])
def test_dora_norm(kernels, draw, r):
    w, a, b, magnitude = draw(D_OUT, D_IN), draw(r, D_IN), draw(D_OUT, r), draw(D_OUT)
    norm, gain = kernels.dora_norm(w, a, b, S, magnitude)
    close(norm, norm_reference.dora_norm(w, a, b, S))
    close(gain, norm_reference.dora_gain(w, a, b, S, magnitude))


def test_dora_norm_takes_float64_where_any_argument_is(kernels, draw):
    w, a, b = draw(D_OUT, D_IN), draw(R, D_IN).float(), draw(D_OUT, R).float()
    norm, gain = kernels.dora_norm(w, a, b, S, None)
    assert gain is None and norm.dtype == torch.float64
    close(norm, norm_reference.dora_norm(w, a, b, S))


def test_dropout_rate_and_independence(backend, device):
    dropout, other = Dropout.draw(0.25, device), Dropout.draw(0.25, device)
    kept, again = keep(backend, dropout, 256) != 0, keep(backend, other, 256) != 0
    spread = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.75) < 5 * spread
    assert abs((kept & again).double().mean().item() - 0.75**2) < 5 * spread
    for dimension in (0, 1, 2):  # neighbours are independent
        pairs = kept & kept.roll(1, dimension)
        assert abs(pairs.double().mean().item() - 0.75**2) < 5 * spread
