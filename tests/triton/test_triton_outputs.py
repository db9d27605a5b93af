"""Every element of every output is written, and nothing beside it: the launchers allocate, the kernels fill."""

import math

import pytest
import torch
from linear_cases import SITES
from triton_cases import make

GUARD = 64


@pytest.mark.parametrize("r", [3, 100])
@pytest.mark.parametrize("site", SITES)
def test_outputs_start_as_nan_and_stay_within_bounds(site, r, monkeypatch):
    case = make(n=3, t=40, d_in=70, d_out=67, r=r, site=site, dora=True, p=0.2)
    want = case.results("triton")
    rooms, original = [], torch.Tensor.new_empty

    def new_empty(tensor, shape, dtype=None, **options):
        if options:  # the interpreter's own
            return original(tensor, shape, dtype=dtype, **options)
        size = math.prod(shape)
        room = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype or tensor.dtype, device=tensor.device)
        rooms.append(room)
        return room[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    got = case.results("triton")
    monkeypatch.undo()
    assert len(rooms) > 8
    for room in rooms:
        assert room[:GUARD].isnan().all() and room[-GUARD:].isnan().all()
        assert not room[GUARD:-GUARD].isnan().any()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
