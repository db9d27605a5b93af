"""Projection and gate as a function."""

import math

import pytest
import torch

from echolora_kernels.functional import echo_network

BACKENDS = ["reference"]  # later backends join here
NAMES = ["proj_down", "proj_up", "gate_down", "gate_up", "gate_bias", "scale"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def parameters(dtype=torch.float64, d=5, m=3, width=4):
    shapes = [(m, d), (width, m), (m, d), (width, m), (width,), ()]
    return {name: torch.randn(shape, dtype=dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def by_hand(u, p):
    """lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u)), one number at a time."""

    def dot(row, vector):
        return sum(a * b for a, b in zip(row, vector, strict=True))

    p = {name: value.tolist() for name, value in p.items()}
    delta = []
    for state in u.tolist():
        hidden = [math.tanh(dot(row, state)) for row in p["proj_down"]]
        gate_hidden = [math.tanh(dot(row, state)) for row in p["gate_down"]]
        rows = zip(p["proj_up"], p["gate_up"], p["gate_bias"], strict=True)
        delta.append([p["scale"] * dot(w2, hidden) / (1 + math.exp(-(dot(u2, gate_hidden) + c))) for w2, u2, c in rows])
    return torch.tensor(delta, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3])
def test_formula(n, backend):
    p, u = parameters(), torch.randn(n, 5).double()
    torch.testing.assert_close(echo_network(u, **p, backend=backend), by_hand(u, p), rtol=1e-12, atol=1e-13)


def test_float32_is_near_the_formula(backend):
    p, u = parameters(torch.float32), torch.randn(6, 5)
    delta = echo_network(u, **p, backend=backend)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), by_hand(u, p), rtol=1e-5, atol=1e-5)


def test_empty_batch(backend):
    assert echo_network(torch.zeros(0, 5).double(), **parameters(), backend=backend).shape == (0, 4)


def test_gradcheck(backend):
    tensors = [torch.randn(3, 5).double(), *parameters().values()]

    def call(*args):
        return echo_network(*args, backend=backend)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize(
    ("zero", "without"),
    [
        (["proj_up", "gate_up"], {"proj_down", "gate_down", "gate_up", "gate_bias", "scale"}),
        (["gate_up"], {"gate_down"}),
        (["proj_down", "proj_up", "gate_up"], set(NAMES)),
        ([], set()),
    ],
    ids=["initial values", "once W2 moved", "the trap of a zero W1", "once U2 moved"],
)
def test_who_has_a_gradient(zero, without, backend):
    p = {name: torch.zeros_like(t) if name in zero else t for name, t in parameters().items()}
    p = {name: t.requires_grad_() for name, t in p.items()}
    delta = echo_network(torch.randn(3, 5).double(), **p, backend=backend)
    (delta * torch.randn(3, 4).double()).sum().backward()
    assert {name for name, t in p.items() if not t.grad.any()} == without
