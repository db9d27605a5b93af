"""`EchoNetwork`: initial values, who learns when, bad sizes."""

import math

import pytest
import torch

from echolora_kernels import EchoNetwork

NAMES = ["proj_down.weight", "proj_up.weight", "gate_down.weight", "gate_up.weight", "gate_up.bias", "scale"]


def network(**options):
    return EchoNetwork(5, 4, **{"bottleneck": 3, "dtype": torch.float64, **options})


def moving(net):
    """Names of the parameters with a gradient that is not zero."""
    net.zero_grad()
    (net(torch.randn(3, 5).double()) * torch.randn(3, 4).double()).sum().backward()
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in EchoNetwork(5, 4).named_parameters()}
    assert shapes == dict(zip(NAMES, [(64, 5), (4, 64), (64, 5), (4, 64), (4,), (1,)], strict=True))


def test_initial_values():
    net = network()
    assert not net.proj_up.weight.any()
    assert not net.gate_up.weight.any()
    assert torch.equal(net.gate_up.bias, torch.full((4,), -2.0).double())
    assert net.scale.item() == pytest.approx(0.1)
    bound = 1 / math.sqrt(5)
    for down in (net.proj_down.weight, net.gate_down.weight):
        assert 0.5 * bound < down.abs().max() <= bound
    assert not torch.equal(net.proj_down.weight, net.gate_down.weight)
    delta = net(torch.randn(3, 5).double())
    assert delta.shape == (3, 4)
    assert not delta.any()


def test_chosen_values():
    net = network(gate_bias=0.5, scale=3.0)
    assert (net.gate_up.bias == 0.5).all()
    assert net.scale.item() == 3.0


def test_learns_one_after_the_other():
    """W2 at once; W1, U2, c and lambda once W2 has moved; U1 once U2 has."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert moving(net) == {"proj_up.weight"}
    optimizer.step()
    assert moving(net) == set(NAMES) - {"gate_down.weight"}
    optimizer.step()
    assert moving(net) == set(NAMES)


def test_forward_is_the_formula():
    """scale * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u)), every parameter in its place."""
    net, u = network(), torch.randn(3, 5).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    w1, w2, u1, u2 = (getattr(net, n).weight for n in ("proj_down", "proj_up", "gate_down", "gate_up"))
    gate = 1 / (1 + (-((u @ u1.T).tanh() @ u2.T + net.gate_up.bias)).exp())
    torch.testing.assert_close(net(u), net.scale * gate * ((u @ w1.T).tanh() @ w2.T), rtol=1e-12, atol=1e-12)


def test_dtype_and_device():
    assert {p.dtype for p in EchoNetwork(5, 4, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in EchoNetwork(5, 4, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["width", "out_features", "bottleneck"])
@pytest.mark.parametrize("size", [0, -3])
def test_bad_sizes(name, size):
    with pytest.raises(ValueError, match=f"^{name}: got {size}, wants at least 1"):
        EchoNetwork(**{"width": 5, "out_features": 4, "bottleneck": 3, name: size})
