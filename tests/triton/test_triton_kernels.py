"""Each kernel through its launcher, against its formula, for every tile that the rules can pick."""

import pytest
import torch
from triton_cases import DEVICE

from echolora_kernels.ops.dora_norm import reference as norm_reference
from echolora_kernels.ops.dora_norm.triton_norm import dora_norm
from echolora_kernels.ops.echo_lora_linear import configs
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout
from echolora_kernels.ops.echo_lora_linear.triton_backward_launch import (
    adapter_backward,
    input_backward,
    lora_a_backward,
)
from echolora_kernels.ops.echo_lora_linear.triton_forward_launch import linear, shrink
from echolora_kernels.ops.echo_lora_linear.triton_scale import scale_rows

N, T, D_IN, D_OUT, R = 3, 37, 71, 83, 20
S = 0.7
KINDS = ("half", "single", "double")


def tiles(kernel):
    found = {tile for kind in KINDS for tile in configs.TILES[kernel, kind].values()}
    return pytest.mark.parametrize("tile", sorted(found, key=str), ids=lambda t: f"{t.rows}x{t.cols}x{t.inner}")


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@pytest.fixture
def dropout():
    return Dropout.draw(0.4, DEVICE)


def keep(dropout, width=D_IN):
    """The scaled keep-mask, by the smallest tile."""
    ones = draw(N, T, width).fill_(1)
    return shrink(ones, torch.eye(width, dtype=torch.float64, device=DEVICE), 1.0, dropout=dropout).view(N, T, width)


@tiles("shrink")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("site", ["none", "adapter_input", "rank"])
def test_shrink(tile, splits, site, dropout):
    x, a, mask = draw(N, T, D_IN), draw(R, D_IN), torch.rand(N, T, device=DEVICE) < 0.5
    delta = draw(N, R if site == "rank" else D_IN)
    got = shrink(x, a, S, dropout=dropout, site=site, delta=delta, mask=mask, tile=tile, splits=splits)
    echo = mask[..., None] * delta[:, None]
    x = x * keep(dropout)
    want = (x + echo) @ a.T if site == "adapter_input" else x @ a.T + (echo if site == "rank" else 0)
    close(got.view(N, T, R), S * want)


@tiles("matmul")
@pytest.mark.parametrize("dora", [False, True])
def test_linear(tile, dora, dropout):
    x, w, s, b, bias = draw(N, T, D_IN), draw(D_OUT, D_IN), draw(N * T, R), draw(D_OUT, R), draw(D_OUT)
    delta, mask, gain = draw(N, D_OUT), torch.rand(N, T, device=DEVICE) < 0.5, draw(D_OUT) if dora else None
    got, z = linear(x, w, s, b, bias=bias, gain=gain, delta=delta, mask=mask, dropout=dropout, store_z=True, tile=tile)
    inner = (x * keep(dropout) if dora else x) @ w.T + (s @ b.T).view(N, T, D_OUT)
    outer = (x - x * keep(dropout)) @ w.T if dora else 0
    close(z.view(N, T, D_OUT), inner - (s @ b.T).view(N, T, D_OUT))
    want = outer + inner * (gain if dora else 1) + bias + mask[..., None] * delta[:, None]
    close(got.view(N, T, D_OUT), want)


@tiles("adapter_bwd")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_backward(tile, splits, dora):
    dy, s, b, z = draw(N, T, D_OUT), draw(N * T, R), draw(D_OUT, R), draw(N * T, D_OUT)
    gain, mask = draw(D_OUT) if dora else None, torch.rand(N, T, device=DEVICE) < 0.5
    needs = dict.fromkeys(("need_ds", "need_lora_b", "need_bias", "need_gain", "need_delta"), True)
    got = adapter_backward(dy, s, b, S, gain=gain, z=z, mask=mask, tile=tile, splits=splits, **needs)
    flat = dy.view(N * T, D_OUT)
    scaled = flat * gain if dora else flat
    close(got.ds, S * scaled @ b)
    close(got.lora_b, scaled.T @ s)
    close(got.bias, flat.sum(0))
    close(got.gain, (flat * (z + s @ b.T)).sum(0))
    close(got.delta, (mask[..., None] * dy).sum(1))
    assert torch.isfinite(got.ds).all()


@tiles("lora_a_bwd")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_lora_a_backward(tile, splits, echo, dropout):
    x, ds = draw(N, T, D_IN), draw(N * T, R)
    delta, mask = (draw(N, D_IN), torch.rand(N, T, device=DEVICE) < 0.5) if echo else (None, None)
    options = {"dtype": torch.float64, "tile": tile, "splits": splits}
    got = lora_a_backward(x, ds, dropout=dropout, delta=delta, mask=mask, **options)
    x = x * keep(dropout) + (mask[..., None] * delta[:, None] if echo else 0)
    close(got, ds.T @ x.reshape(-1, D_IN))


@tiles("matmul")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_input_backward(tile, dora, drops, dropout):
    dy, w, ds, a = draw(N, T, D_OUT), draw(D_OUT, D_IN), draw(N * T, R), draw(R, D_IN)
    gain = draw(D_OUT) if dora else None
    got = input_backward(dy, w, ds, a, dropout=dropout if drops else Dropout(), gain=gain, tile=tile)
    low = (ds @ a).view(N, T, D_IN)
    factor = keep(dropout) if drops else 1
    extra = (dy * (gain - 1)) @ w if dora else 0
    close(got.view(N, T, D_IN), dy @ w + factor * (low + extra))


@tiles("dora_norm")
@pytest.mark.parametrize(("r", "splits"), [(1, 1), (R, None), (R, 3), (130, 16)])
def test_dora_norm(tile, r, splits):
    w, a, b, magnitude = draw(D_OUT, D_IN), draw(r, D_IN), draw(D_OUT, r), draw(D_OUT)
    norm, gain = dora_norm(w, a, b, S, magnitude, tile=tile, splits=splits)
    close(norm, norm_reference.dora_norm(w, a, b, S))
    close(gain, norm_reference.dora_gain(w, a, b, S, magnitude))


def test_dora_norm_of_a_row_that_the_adapter_all_but_cancels():
    """Within 1.5 times plain torch's float32 error, where the expanded square would lose every digit."""
    a, b = draw(R, 256), draw(64, R)
    w = (1e-3 * draw(64, 256) - S * b @ a).float()
    a, b = a.float(), b.float()
    exact = norm_reference.dora_norm(w.double(), a.double(), b.double(), S)
    errors = [norm.double() - exact for norm in (dora_norm(w, a, b, S)[0], norm_reference.dora_norm(w, a, b, S))]
    for size in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
        ours, plain = map(size, errors)
        assert ours <= 1.5 * plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scale_rows_in_any_layout(dtype):
    whole, factor = draw(130, 150).to(dtype), draw(70).to(torch.promote_types(dtype, torch.float32))
    for matrix in (whole[:70], whole[:, :70].t(), whole[3:73, 2:135:2]):
        got = scale_rows(matrix, factor)
        assert (
            torch.equal(got, (matrix * factor[:, None]).to(dtype)) and got.stride() == torch.empty_like(matrix).stride()
        )
