"""The products through tensor descriptors, in the interpreter: same results as through pointers."""

from dataclasses import replace

import pytest
import torch
from linear_cases import assert_equal_up_to_rounding
from triton_cases import make, reference_results

from echolora_kernels.ops.echo_lora_linear import candidates, configs
from echolora_kernels.ops.echo_lora_linear.configs import Tile
from echolora_kernels.ops.echo_lora_linear.launch import Launch
from echolora_kernels.ops.echo_lora_linear.triton_descriptors import describable


@pytest.fixture(params=[True, False], ids=["persistent", "one tile each"])
def everywhere(monkeypatch, request):
    """Descriptors for every dtype and device, with tiles that make one program walk over several, or of its own."""
    monkeypatch.setattr(configs, "uses_descriptors", lambda *_: True)
    monkeypatch.setattr(configs, "descriptor_tile", lambda *_, **__: Tile(16, 16, 16, 4, 1, request.param))
    monkeypatch.setattr(candidates, "brief", lambda *_: False)
    names, run = [], Launch.run

    def record(planned, device, **tensors):
        names.append(planned.kernel.fn.__name__)
        run(planned, device, **tensors)

    monkeypatch.setattr(Launch, "run", record)
    return names


BOTH = ["linear_descriptor_fwd_kernel", "input_descriptor_bwd_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", [None, "output", "adapter_input", "rank"])
def test_float64(everywhere, site, dora, p, monkeypatch):
    case = make(n=2, t=35, d_in=50, d_out=70, site=site, dora=dora, p=p)
    assert_equal_up_to_rounding(case.results("triton"), reference_results(case, monkeypatch))
    descriptors = [name for name in everywhere if name in BOTH]
    assert descriptors == ([] if dora and p else BOTH[:1] if dora else BOTH)


@pytest.mark.parametrize("r", [1, 16, 65, 256])
def test_ranks_and_tiles_beyond_the_programs(everywhere, r):
    case = make(n=3, t=50, d_in=34, d_out=98, r=r, site="output")
    assert_equal_up_to_rounding(case.results("triton"), case.results("reference"))
    assert [name for name in everywhere if name in BOTH] == BOTH


def test_what_descriptors_cannot_address_goes_through_pointers(everywhere):
    case = make(n=2, t=9, d_in=20, d_out=22)
    odd_rows = torch.randn(2, 9, 21, dtype=torch.float64, device=case.x.device)[..., :20]
    expanded = torch.ones((), dtype=torch.float64, device=case.x.device).expand(case.dy.shape)
    for change, names in (({"x": odd_rows}, BOTH[1:]), ({"dy": expanded}, BOTH[:1]), ({}, BOTH)):
        everywhere.clear()
        odd = replace(case, **change)
        assert_equal_up_to_rounding(odd.results("triton"), odd.results("reference"))
        assert [name for name in everywhere if name in BOTH] == names


def test_describable():
    good = torch.empty(4, 16)
    assert describable(good, good[1:], good[:, :8])
    assert not describable(good, good.t())
    assert not describable(good[:, 1:])
    assert not describable(torch.empty(4, 3))
    assert not describable(torch.empty(0, 16))
    assert not describable(torch.empty(1, 16).expand(4, 16))


def test_only_half_precision_and_thin_adapters_on_hopper_and_newer_use_them():
    for arch in ("sm_80", "sm_89", "sm_120", "gfx942", "cpu"):
        assert not configs.uses_descriptors(16, torch.bfloat16, arch)
    for arch in ("sm_90", "sm_100"):
        assert configs.uses_descriptors(64, torch.bfloat16, arch) and configs.uses_descriptors(1, torch.float16, arch)
        assert not configs.uses_descriptors(16, torch.float32, arch)
        assert not configs.uses_descriptors(65, torch.bfloat16, arch)


def test_tiles():
    hopper = configs.Device("sm_90", 132)
    tiles = configs.candidates("descriptor", torch.bfloat16, "sm_90")

    def name(rows, cols, rank=16, rich=False):
        tile = configs.descriptor_tile(rows, cols, rank, torch.bfloat16, hopper, rich)
        return next(name for name, listed in tiles.items() if listed == tile)

    assert name(8192, 4096) == "wide"
    assert name(8192, 4096, rich=True) == name(8192, 4096, rank=17) == name(2048, 2048) == "large"
    assert name(512, 512) == "small"
