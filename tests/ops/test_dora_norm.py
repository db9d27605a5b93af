"""Row norm of the adapted weight and the gain made of it."""

import math

import pytest
import torch

from echolora_kernels.ops.dora_norm.reference import dora_gain
from echolora_kernels.reference import dora_norm

S = 0.7


def problem(dtype=torch.float64, d_out=5, d_in=7, rank=3):
    shapes = {"weight": (d_out, d_in), "lora_a": (rank, d_in), "lora_b": (d_out, rank)}
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes.values()]


def exact(weight, lora_a, lora_b, scaling):
    """The norms, element by element in Python floats."""
    w, a, b = weight.tolist(), lora_a.tolist(), lora_b.tolist()
    norms = []
    for i, row in enumerate(w):
        adapted = [v + scaling * sum(b[i][k] * a[k][j] for k in range(len(a))) for j, v in enumerate(row)]
        norms.append(math.sqrt(sum(v * v for v in adapted)))
    return torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "out", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float16, torch.float32, 1e-6),
    ],
)
def test_norm(dtype, out, tolerance):
    """In float32 or wider, whatever the parameters are in."""
    tensors = problem(dtype)
    norm = dora_norm(*tensors, S)
    assert norm.dtype == out
    torch.testing.assert_close(norm.double(), exact(*tensors, S), rtol=tolerance, atol=0)


def test_mixed_dtypes_take_the_widest():
    weight, a, b = problem()
    norm = dora_norm(weight.bfloat16(), a, b, S)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, exact(weight.bfloat16(), a, b, S), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_narrow_it(dtype):
    tensors = problem(dtype, d_in=64)
    wide = dora_norm(*tensors, S)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora_norm(*tensors, S), wide)


def test_norm_is_a_constant():
    tensors = [t.requires_grad_() for t in problem()]
    assert not dora_norm(*tensors, S).requires_grad


def test_gain_and_its_only_gradient():
    tensors = [t.requires_grad_() for t in problem()]
    magnitude = (torch.rand(5).double() + 0.5).requires_grad_()
    gain = dora_gain(*tensors, S, magnitude)
    norm = exact(*tensors, S)
    torch.testing.assert_close(gain, magnitude / norm, rtol=1e-13, atol=0)
    gain.sum().backward()
    torch.testing.assert_close(magnitude.grad, 1 / norm, rtol=1e-13, atol=0)
    assert all(t.grad is None for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_zero_row_has_a_finite_gain(dtype):
    weight, a, b = problem(dtype)
    weight[2], b[2] = 0, 0
    magnitude = dora_norm(weight, a, b, S).to(dtype)
    gain = dora_gain(weight, a, b, S, magnitude)
    assert gain.isfinite().all()
    assert gain[2] == 0
