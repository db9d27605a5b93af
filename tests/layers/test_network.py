"""`EchoNetworks`: initial values, who learns when, one network's parameters, bad sizes."""

import math

import pytest
import torch
from tiny import network_gradients
from torch import nn

from echolora_kernels import EchoNetworks

WIDTHS = {"first": 4, "second": 6}
NAMES = ("proj_down", "proj_up", "gate_down", "gate_up", "gate_bias", "scale")


def networks(**options):
    return EchoNetworks(5, WIDTHS, **{"bottleneck": 3, "dtype": torch.float64, **options})


def moving(nets):
    """What has a gradient that is not zero, alike in every network."""
    nets.zero_grad()
    sum((delta * torch.randn_like(delta)).sum() for delta in nets(torch.randn(3, 5).double()).values()).backward()
    found = [{name for name in NAMES if getattr(each, name).any()} for each in network_gradients(nets).values()]
    assert all(each == found[0] for each in found)
    return found[0]


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in EchoNetworks(5, WIDTHS).named_parameters()}
    assert shapes == {"down": (256, 5), "proj_up": (10, 64), "gate_up": (10, 64), "gate_bias": (10,), "scale": (2,)}


def test_one_network_has_its_own_rows():
    nets = networks()
    with torch.no_grad():
        for p in nets.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    for name, places in {"first": (0, 3, 0, 4, 0), "second": (6, 9, 4, 10, 1)}.items():
        w1, u1, start, end, index = places
        found = nets.network(name)
        assert not any(each.requires_grad for each in found)
        assert torch.equal(found.proj_down, nets.down[w1 : w1 + 3])
        assert torch.equal(found.gate_down, nets.down[u1 : u1 + 3])
        for part in ("proj_up", "gate_up", "gate_bias"):
            assert torch.equal(getattr(found, part), getattr(nets, part)[start:end])
        assert torch.equal(found.scale, nets.scale[index])
        found.proj_up.zero_()
        assert not nets.proj_up[start:end].any()
    with pytest.raises(KeyError):
        nets.network("third")


def test_initial_values():
    nets = networks()
    assert not nets.proj_up.any() and not nets.gate_up.any()
    assert torch.equal(nets.gate_bias, torch.full((10,), -2.0).double())
    torch.testing.assert_close(nets.scale, torch.full((2,), 0.1).double())
    bound = 1 / math.sqrt(5)
    assert all(0.5 * bound < down.abs().max() <= bound for down in nets.down.split(3))
    assert len({down.sum().item() for down in nets.down.split(3)}) == 4
    assert not any(delta.any() for delta in nets(torch.randn(3, 5).double()).values())


def test_a_seed_gives_what_linear_layers_of_each_network_would_draw():
    torch.manual_seed(1)
    nets = networks()
    torch.manual_seed(1)
    for name, width in WIDTHS.items():
        shapes = ((5, 3, False), (3, width, False), (5, 3, False), (3, width, True))
        layers = [nn.Linear(*shape, dtype=torch.float64) for shape in shapes]
        assert torch.equal(nets.network(name).proj_down, layers[0].weight)
        assert torch.equal(nets.network(name).gate_down, layers[2].weight)


def test_chosen_values():
    nets = networks(gate_bias=0.5, scale=3.0)
    assert (nets.gate_bias == 0.5).all() and (nets.scale == 3.0).all()


def test_learns_one_after_the_other():
    """W2 at once; W1, U2, c and lambda once W2 has moved; U1 once U2 has."""
    nets = networks()
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.1)
    assert moving(nets) == {"proj_up"}
    optimizer.step()
    assert moving(nets) == set(NAMES) - {"gate_down"}
    optimizer.step()
    assert moving(nets) == set(NAMES)


def test_forward_is_the_formula():
    """scale * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u)), every parameter in its place."""
    nets, u = networks(), torch.randn(3, 5).double()
    with torch.no_grad():
        for p in nets.parameters():
            p.normal_()
    deltas = nets(u)
    assert list(deltas) == list(WIDTHS)
    for name, delta in deltas.items():
        w1, w2, u1, u2, c, scale = nets.network(name)
        gate = 1 / (1 + (-((u @ u1.T).tanh() @ u2.T + c)).exp())
        torch.testing.assert_close(delta, scale * gate * ((u @ w1.T).tanh() @ w2.T), rtol=1e-12, atol=1e-12)


def test_dtype_and_device():
    nets = EchoNetworks(5, WIDTHS, dtype=torch.bfloat16)
    assert {p.dtype for p in nets.parameters()} == {torch.bfloat16}
    assert {delta.dtype for delta in nets(torch.randn(2, 5).bfloat16()).values()} == {torch.bfloat16}
    nets = EchoNetworks(5, WIDTHS, device="meta")
    assert {p.device.type for p in nets.parameters()} == {"meta"}
    assert nets(torch.empty(2, 5, device="meta"))["second"].shape == (2, 6)


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", ["width", "bottleneck", "out_features"])
def test_bad_sizes(name, size):
    changed = {name: {"only": size} if name == "out_features" else size}
    said = "out_features['only']" if name == "out_features" else name
    with pytest.raises(ValueError) as raised:
        EchoNetworks(**{"width": 5, "out_features": WIDTHS, "bottleneck": 3, **changed})
    assert str(raised.value) == f"{said}: got {size}, wants at least 1"


def test_no_module():
    with pytest.raises(ValueError, match=r"^out_features: got no module"):
        EchoNetworks(5, {})
