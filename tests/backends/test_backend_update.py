"""`lora_update` by every backend against its reference: forward, every gradient, and what is saved and written."""

import itertools
import types
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from linear_cases import (
    SEED,
    assert_equal_up_to_rounding,
    device_for,
    error_ratios,
    keep_mask,
    why_not,
)

from echolora_kernels import BackendUnavailable
from echolora_kernels.functional import lora_update
from echolora_kernels.ops.echo_lora_linear import compiled_kernels
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout
from echolora_kernels.ops.echo_lora_linear.kernels import load
from echolora_kernels.ops.lora_update import operators, reference

NAMES = ("base", "x", "lora_a", "lora_b", "gain", "bias")


@dataclass(frozen=True)
class Case:
    """One set of arguments; None where the operator goes without."""

    base: torch.Tensor
    x: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor
    dropout_p: float = 0.0
    overwrite_base: bool = False

    def tensors(self):
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def to(self, dtype):
        return replace(self, **{name: t.to(dtype) for name, t in self.tensors().items()}, dy=self.dy.to(dtype))

    def call(self, backend):
        return lora_update(
            self.base, self.x, self.lora_a, self.lora_b, 0.7, gain=self.gain, bias=self.bias,
            dropout_p=self.dropout_p, overwrite_base=self.overwrite_base, backend=backend,
        )  # fmt: skip

    def results(self, backend, needs=None):
        """y and the gradients of `needs`; base is no leaf, as behind a layer."""
        needs = tuple(self.tensors()) if needs is None else needs
        leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in self.tensors().items()}
        torch.manual_seed(SEED)
        y = replace(self, **leaves | {"base": leaves["base"] * 1}).call(backend)
        gradients = torch.autograd.grad(y, [leaves[name] for name in needs], self.dy) if needs else ()
        return {"y": y.detach(), **dict(zip(needs, gradients, strict=True))}


def make(backend, shape=(2, 9), d_in=19, d_out=21, r=3, *, gain=True, bias=True, dtype=torch.float64, p=0.0, **options):
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype).to(device_for(backend))  # noqa: E731
    return Case(
        base=draw(*shape, d_out),
        x=draw(*shape, d_in),
        lora_a=draw(r, d_in),
        lora_b=draw(d_out, r),
        gain=draw(d_out) if gain else None,
        bias=draw(d_out) if bias else None,
        dy=draw(*shape, d_out),
        dropout_p=p,
        **options,
    )


def wanted(backend, case, monkeypatch, needs=None):
    """`results` of the reference, given the backend's dropout mask."""
    if case.dropout_p:
        keep = keep_mask(backend, case)
        drop = lambda x, p: x * keep.to(x.dtype) / (1 - p)  # noqa: E731
        monkeypatch.setattr(reference, "F", types.SimpleNamespace(linear=F.linear, dropout=drop))
    return case.results("reference", needs)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gain", [False, True])
def test_float64(backend, gain, bias, p, overwrite, monkeypatch):
    case = make(backend, gain=gain, bias=bias, p=p, overwrite_base=overwrite)
    assert_equal_up_to_rounding(case.results(backend), wanted(backend, case, monkeypatch))


@pytest.mark.parametrize("r", [1, 8, 33, 128, 256])
def test_ranks(backend, r, monkeypatch):
    case = make(backend, r=r, p=0.2, overwrite_base=True)
    assert_equal_up_to_rounding(case.results(backend), wanted(backend, case, monkeypatch))


@pytest.mark.parametrize(
    ("shape", "d_in", "d_out"), [((), 5, 4), ((1,), 1, 1), ((70,), 35, 67), ((5, 1), 130, 17), ((2, 3, 4), 19, 21)]
)
def test_shapes(backend, shape, d_in, d_out, monkeypatch):
    case = make(backend, shape, d_in, d_out, p=0.2)
    assert_equal_up_to_rounding(case.results(backend), wanted(backend, case, monkeypatch))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_batches(backend, shape):
    case = make(backend, shape, p=0.2, overwrite_base=True)
    assert_equal_up_to_rounding(case.results(backend), case.results("reference"))


def test_any_strides(backend):
    case = make(backend)
    turned = {name: getattr(case, name).transpose(0, -1).contiguous().transpose(0, -1) for name in ("x", "lora_a")}
    wide = {name: torch.stack((getattr(case, name),) * 2, -1)[..., 0] for name in ("base", "lora_b", "gain", "bias")}
    strided = replace(case, **turned, **wide, dy=case.dy[:1, :1].expand_as(case.dy), overwrite_base=True)
    plain = replace(case, dy=strided.dy.contiguous())
    assert_equal_up_to_rounding(strided.results(backend), plain.results("reference"))


def test_every_combination_of_needed_gradients(backend, monkeypatch):
    case = make(backend, (5,), 7, 6, p=0.3, overwrite_base=True)
    every = wanted(backend, case, monkeypatch)
    for size in range(len(case.tensors()) + 1):
        for needs in itertools.combinations(case.tensors(), size):
            assert_equal_up_to_rounding(case.results(backend, needs), {n: every[n] for n in ("y", *needs)})


@pytest.mark.parametrize(("gain", "p"), [(False, 0.3), (True, 0.0)])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "float32 on bfloat16"],
)
def test_as_exact_as_torch(backend, device, dtype, lora_dtype, gain, p, monkeypatch):
    """Largest and rms error of y and every gradient: at most 1.5 times plain torch's, both against float64."""
    if reason := why_not(backend, dtype):
        pytest.skip(reason)
    sizes = ((15, 6), 75, 70, 12) if backend == "triton" and device.type == "cpu" else ((15, 12), 150, 141, 12)
    found = defaultdict(list)
    for draw in range(4):
        torch.manual_seed(draw)
        case = make(backend, *sizes, gain=gain, dtype=dtype, p=p, overwrite_base=True)
        case = replace(case, lora_a=case.lora_a.to(lora_dtype), lora_b=case.lora_b.to(lora_dtype))
        got, plain = case.results(backend), wanted(backend, case, monkeypatch)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in plain.items()}
        for name, pair in error_ratios(got, plain, case.to(torch.float64).results("reference")).items():
            found[name].append(pair)
    ratios = {name: tuple(sum(each) / len(each) for each in zip(*pairs, strict=True)) for name, pairs in found.items()}
    assert max(max(pair) for pair in ratios.values()) <= 1.5, ratios


def overwritten(case, backend, base):
    """Whether y lies where base did."""
    y = replace(case, base=base, overwrite_base=True).call(backend)
    return y.data_ptr() == base.data_ptr()


def test_base_is_overwritten_where_autograd_allows_it(backend):
    case = make(backend, gain=False)
    case.lora_a.requires_grad_()
    assert overwritten(case, backend, case.base.clone())
    assert overwritten(case, backend, case.base.clone().requires_grad_() * 1)
    assert not overwritten(case, backend, case.base.clone().requires_grad_())
    assert not overwritten(case, backend, (case.base.clone().requires_grad_() * 1)[:])
    assert not overwritten(case, backend, case.base.mT.contiguous().mT)
    scaled = replace(case, gain=torch.ones_like(case.bias))
    assert overwritten(scaled, backend, case.base.clone())
    assert not overwritten(replace(scaled, gain=scaled.gain.requires_grad_()), backend, case.base.clone())
    with torch.no_grad():
        assert overwritten(scaled, backend, case.base.clone())
    kept = case.base.clone()
    case.call(backend)
    assert torch.equal(case.base, kept)  # without leave
    base = case.base.clone().requires_grad_() * 1
    read_before = base.square().sum()
    assert overwritten(case, backend, base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read_before.backward()


def test_nothing_wide_is_saved_but_x_and_what_a_learning_gain_reads(backend):
    case = make(backend, p=0.3, overwrite_base=True)
    for needs, count in ((("base", "x", "lora_a", "lora_b", "bias"), 0), (tuple(case.tensors()), 1)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            case.results(backend, needs)
        assert [t.data_ptr() for t in saved if t.numel() == case.x.numel()] == [case.x.data_ptr()]
        assert len([t for t in saved if t.numel() == case.dy.numel()]) == count


def test_autocast_computes_in_the_dtype_of_base(backend, device):
    dtype = torch.float16 if why_not(backend, torch.bfloat16) else torch.bfloat16
    case = make(backend, dtype=torch.float32)
    narrow = replace(case, **{name: getattr(case, name).to(dtype) for name in ("base", "x")})
    with torch.autocast(device.type, dtype):
        y = replace(narrow, x=narrow.x.float()).call(backend)
    assert torch.equal(y, narrow.call(backend)) and y.dtype == dtype
    with pytest.raises(TypeError, match=r"^x: got dtype torch.float32, wants .* as base"):
        replace(narrow, x=narrow.x.float()).call(backend)


def test_what_is_refused(backend):
    case = make(backend)
    for name, change in {
        "base": lambda t: t[:1],
        "lora_a": lambda t: t[:, 1:],
        "lora_b": lambda t: t[1:],
        "gain": lambda t: t[1:],
        "bias": lambda t: t.unsqueeze(0),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: got shape"):
            replace(case, **{name: change(getattr(case, name))}).call(backend)
    with pytest.raises(TypeError, match=r"^gain: got dtype torch\.int64"):
        replace(case, gain=case.gain.long()).call(backend)
    with pytest.raises(ValueError, match=r"^dropout_p: got 1\.0"):
        replace(case, dropout_p=1.0).call(backend)
    with pytest.raises(ValueError, match=f"^lora_a: got rank 257, wants at most 256 on the {backend}"):
        make(backend, r=257).call(backend)
    with pytest.raises(BackendUnavailable, match="got device meta"):
        Case(**{name: t.to("meta") for name, t in case.tensors().items()}, dy=case.dy).call(backend)


def test_expand_keeps_z_apart_from_base(backend):
    """As `Kernels` states it: z is base itself."""
    kernels, case = load(backend), make(backend, (6,))
    s = torch.randn(6, 3, dtype=torch.float64).to(case.x.device)
    kept = case.base.clone()
    y, z = kernels.expand(s, case.lora_b, case.base, bias=case.bias, gain=case.gain, in_place=False, store_z=True)
    whole = kept + s @ case.lora_b.T
    torch.testing.assert_close(y, case.gain * whole + case.bias)
    assert z.data_ptr() == case.base.data_ptr() and torch.equal(z, kept)


@pytest.mark.parametrize(("gain", "p"), [(False, 0.0), (True, 0.3)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_operators_pass_opcheck(backend, gain, p, shape):
    case = make(backend, shape, 5, 6, gain=gain, p=p)
    for tensor in case.tensors().values():
        tensor.requires_grad_()
    seed = Dropout.draw(p, case.x.device).seed
    arguments = (case.base, case.x, case.lora_a, case.lora_b, case.gain, case.bias, seed, backend, 0.7, p)
    torch.library.opcheck(operators.forward_operator, arguments)


@pytest.mark.parametrize(("gain", "p"), [(False, 0.0), (True, 0.3)])
def test_one_graph_equals_eager(backend, gain, p):
    torch.compiler.reset()
    compiled = torch.compile(lambda case: case.call(backend), fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (4, 7):
        case = make(backend, (2, t), 5, 6, gain=gain, p=p, overwrite_base=True)
        want = case.results(backend)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
        torch.manual_seed(SEED)
        y = compiled(replace(case, **leaves))
        gradients = torch.autograd.grad(y, list(leaves.values()), case.dy)
        for name, value in zip(("y", *leaves), (y, *gradients), strict=True):
            assert torch.equal(value, want[name]), name


def test_the_library_writes_a_matrix(monkeypatch):
    """The gradient of x alone: the CUDA half takes [M, K] and nothing else."""
    shapes = []
    default = lambda *arguments: shapes.append(arguments[-1].shape)  # noqa: E731
    library = types.SimpleNamespace(input_epilogue=types.SimpleNamespace(default=default))
    monkeypatch.setattr(compiled_kernels, "_operators", lambda: library)
    ds, lora_a = torch.ones(6, 2), torch.ones(2, 5)
    dx = compiled_kernels.CUDA.adapter_input_gradient(ds, lora_a, dropout=Dropout(), dtype=ds.dtype)
    assert shapes == [dx.shape] == [(6, 5)]
