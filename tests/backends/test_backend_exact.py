"""Small integers, whose sums every dtype holds exactly: results are equal, not close, whatever block or tile a number
falls in. Also which elements are dropped, word for word, and how far an Inf or NaN reaches.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from linear_cases import make, reference_results, why_not

from echolora_kernels.ops.echo_lora_linear.dropout import DROP_BITS, Dropout
from echolora_kernels.ops.echo_lora_linear.kernels import load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [  # n, t, d_in, d_out, r: ragged and whole blocks, tiles and chunks of rows on every side
    (2, 33, 141, 131, 12), (1, 70, 257, 64, 17), (3, 31, 32, 259, 33), (1, 64, 128, 256, 64), (2, 5, 1, 1, 1),
    (1, 40, 129, 97, 100), (1, 33, 150, 40, 256), (2, 700, 17, 40, 16), (700, 3, 24, 9, 20), (45, 50, 8, 16, 130),
]  # fmt: skip
WAYS = list(  # (site, p), transposed
    itertools.product([(None, 0.0), (None, 0.5), ("output", 0.0), ("adapter_input", 0.5), ("rank", 0.0)], [False, True])
)


@pytest.fixture
def interpreted(backend, device):
    return backend == "triton" and device.type == "cpu"


def integers(*shape, density, device):
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < density)).to(device, torch.float64)


def exact_case(backend, shape, site=None, p=0.0, dtype=torch.float64):
    n, t, d_in, d_out, r = shape
    case = make(backend, *shape, site=site, p=p)
    draw = lambda *sizes, density: integers(*sizes, density=density, device=case.x.device)  # noqa: E731
    return replace(
        case,
        x=draw(n, t, d_in, density=0.3),
        weight=draw(d_out, d_in, density=0.2),
        bias=draw(d_out, density=1),
        lora_a=draw(r, d_in, density=0.2),
        lora_b=draw(d_out, r, density=min(0.5, 8 / r)),
        delta=None if site is None else draw(*case.delta.shape, density=1),
        dy=draw(n, t, d_out, density=0.2),
        scaling=1.0,
    ).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_integers(backend, dtype, shape, interpreted, monkeypatch):
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    # the interpreter takes a second for each, so there every shape has a way of its own
    for (site, p), transposed in WAYS[SHAPES.index(shape) :: len(SHAPES)] if interpreted else WAYS:
        case = exact_case(backend, shape, site, p, dtype)
        if transposed:
            names = ("weight", "lora_a", "lora_b", "x", "dy")
            changed = {name: getattr(case, name).transpose(-1, -2).contiguous().transpose(-1, -2) for name in names}
            case = replace(case, **changed)
        got = case.results(backend)
        with monkeypatch.context() as patched:
            want = reference_results(backend, case.to(torch.float64), patched)
        assert max(want["y"].abs().max(), want["x"].abs().max()) <= 256  # else bfloat16 would round
        for name, value in want.items():
            assert torch.equal(got[name].double(), value.to(dtype).double()), (name, site, p, transposed)


def philox(seed, counter):
    """Philox4x32-7: four words of 32 bits."""
    c, key = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ key[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ key[1], first & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def kept_by(backend, dropout, rows, width):
    """Which elements of [rows, width] stay, read off F1 with A = identity."""
    eye = torch.eye(width, dtype=torch.float64, device=dropout.seed.device)
    return load(backend).shrink(eye.new_ones(1, rows, width), eye, 1.0, dropout=dropout) != 0


@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (1, 0.5), (2**33 + 5, 0.9), (2**62 - 1, 0.3)])
@pytest.mark.parametrize("width", [1, 30, 71, 200])
def test_what_is_dropped(backend, device, width, seed, p):
    """Element (row, column) by word column % 4 of counter row * ceil(width / 4) + column / 4, on every backend."""
    rows, quads, below = 37, (width + 3) // 4, round(p * 2**DROP_BITS)
    kept = kept_by(backend, Dropout(p, torch.tensor([seed], device=device)), rows, width)
    want = [[philox(seed, m * quads + k // 4)[k % 4] >> 8 >= below for k in range(width)] for m in range(rows)]
    assert kept.tolist() == want


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values()], ids=str)
def test_what_a_dropped_inf_or_nan_becomes(backend, device, dtype, value):
    """0 by kernels for GPUs, whose masks choose; NaN by those for CPUs, whose masks multiply as torch's do."""
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    rows, d_in, d_out, r = 37, 70, 40, 5
    kernels, dropout = load(backend), Dropout.draw(0.5, device)
    kept = kept_by(backend, dropout, rows, d_in)
    draw = lambda *shape: integers(*shape, density=0.5, device=device).to(dtype)  # noqa: E731
    x, a, ds, dy, w = draw(1, rows, d_in), draw(r, d_in), draw(rows, r), draw(1, rows, d_out), draw(d_out, d_in)
    other = torch.where(kept, x, value)
    found = [
        (kernels.shrink(other, a, 1.0, dropout=dropout), kernels.shrink(x, a, 1.0, dropout=dropout)),
        tuple(kernels.lora_a_backward(each, ds, dropout=dropout, dtype=dtype) for each in (other, x)),
    ]
    a[:, 9] = value
    dx = kernels.input_product(dy, w, ds, a, dropout=dropout, gain=None)
    found.append((dx[:, 9][~kept[:, 9]], (dy[0] @ w)[:, 9][~kept[:, 9]]))
    for got, without in found:
        assert got.isnan().all() if backend == "cpp" else torch.equal(got, without)
    assert torch.nn.functional.dropout(torch.full((1000,), value, dtype=dtype, device=device), 0.5).isnan().any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_inf_and_nan_stay_in_their_row_and_column(backend, dtype, value, interpreted):
    """Rows and columns past the end of a block are zeros, not what the block before has left there."""
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    # the last eight rows follow a whole block of rows, of one chunk, whose last columns hold the value
    shape = (1, 72, 70, 66, 20) if interpreted else (1, 296, 150, 140, 20)
    case = exact_case(backend, shape, dtype=dtype)
    for name, needs in (
        ("x", ("lora_a",)),
        ("x", ("x", "lora_a")),
        ("dy", ("lora_b",)),
        ("dy", ("x", "bias", "lora_b")),
    ):
        tensor = getattr(case, name).clone()
        tensor[0, -9, -3] = value
        this = replace(case, **{name: tensor})
        got, want = this.results(backend, needs), this.to(torch.float64).results("reference", needs)
        for result, exact in want.items():
            assert not exact.isfinite().all() or result == "x" or name == "dy", (name, result)
            assert torch.equal(got[result].isfinite(), exact.isfinite()), (name, needs, result)
            assert torch.equal(got[result].isnan(), exact.isnan()), (name, needs, result)
