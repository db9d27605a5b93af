"""Arguments for `echo_lora_linear`, and a backend beside the reference."""

from __future__ import annotations

import types
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from echolora_kernels import BackendUnavailable, Echo
from echolora_kernels.backends import BACKENDS
from echolora_kernels.functional import echo_lora_linear
from echolora_kernels.ops.echo_lora_linear import reference
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout
from echolora_kernels.ops.echo_lora_linear.kernels import load

SITES = (None, "output", "adapter_input", "rank")
SEED = 7


def device_for(backend: str) -> torch.device:
    """Where a backend is tested: Triton in its interpreter where there is no GPU."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def why_not(backend: str, dtype: torch.dtype = torch.float64) -> str | None:
    """Why the backend cannot compute here in `dtype`; None where it can."""
    registered = {b.name: b for b in BACKENDS}
    if backend not in registered:
        return "not built"
    reason = registered[backend].why_unavailable()
    if reason is not None:
        return reason
    try:
        load(backend).want_runnable(torch.empty(1, 1, 1, dtype=dtype, device=device_for(backend)))
    except BackendUnavailable as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Case:
    """One set of arguments; None where the operator goes without."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    dy: torch.Tensor | None = None
    site: str | None = None
    scaling: float = 0.7
    dropout_p: float = 0.0
    dora_dropout: str = "exact"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The floating arguments that can have a gradient."""
        names = ("x", "weight", "bias", "lora_a", "lora_b", "magnitude", "delta")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Case:
        """Everything but the mask in another dtype; strides are kept."""
        return replace(
            self, **{name: tensor.to(dtype) for name, tensor in self.tensors().items()}, dy=self.dy.to(dtype)
        )

    def call(self, backend: str) -> torch.Tensor:
        echo = None if self.site is None else Echo(self.delta, self.mask, self.site)
        return echo_lora_linear(
            self.x,
            self.weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.scaling,
            dropout_p=self.dropout_p,
            magnitude=self.magnitude,
            echo=echo,
            dora_dropout=self.dora_dropout,
            backend=backend,
        )

    def results(self, backend: str, needs: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
        """y and the gradients of `needs` (all that do not need a frozen weight's, by default)."""
        needs = tuple(n for n in self.tensors() if n != "weight") if needs is None else needs
        leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in self.tensors().items()}
        torch.manual_seed(SEED)
        y = replace(self, **leaves).call(backend)
        gradients = torch.autograd.grad(y, [leaves[name] for name in needs], self.dy) if needs else ()
        return {"y": y.detach(), **dict(zip(needs, gradients, strict=True))}


def make(
    backend: str,
    n=2,
    t=9,
    d_in=19,
    d_out=21,
    r=3,
    *,
    site=None,
    dora=False,
    bias=True,
    dtype=torch.float64,
    p=0.0,
    float_mask=False,
) -> Case:
    """Random arguments where the backend takes them; nothing is a multiple of a block."""
    device = device_for(backend)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    width = {None: 0, "output": d_out, "adapter_input": d_in, "rank": r}[site]
    mask = torch.rand(n, t, device=device)
    return Case(
        x=draw(n, t, d_in),
        weight=draw(d_out, d_in),
        lora_a=draw(r, d_in),
        lora_b=draw(d_out, r),
        bias=draw(d_out) if bias else None,
        magnitude=draw(d_out) if dora else None,
        delta=draw(n, width) if site else None,
        mask=(mask if float_mask else mask < 0.5) if site else None,
        dy=draw(n, t, d_out),
        site=site,
        dropout_p=p,
    )


def keep_mask(backend: str, case: Case) -> torch.Tensor:
    """Which elements of x the backend's dropout keeps under `results`, [n, T, d_in], read off F1 with A = identity."""
    torch.manual_seed(SEED)
    dropout = Dropout.draw(case.dropout_p, case.x.device)
    d_in = case.x.shape[-1]
    identity = torch.eye(d_in, dtype=torch.float32, device=case.x.device)
    ones = torch.ones(case.x.numel() // d_in, d_in, dtype=torch.float32, device=case.x.device).unsqueeze(0)
    kept = torch.cat([load(backend).shrink(ones, rows, 1.0, dropout=dropout) for rows in identity.split(256)], 1)
    return (kept != 0).view(case.x.shape)


def reference_results(backend: str, case: Case, monkeypatch, needs=None) -> dict[str, torch.Tensor]:
    """`results` of the reference, given the backend's dropout mask."""
    if case.dropout_p:
        keep = keep_mask(backend, case)
        drop = lambda x, p: x * keep.to(x.dtype) / (1 - p)  # noqa: E731
        monkeypatch.setattr(reference, "F", types.SimpleNamespace(linear=F.linear, dropout=drop))
    return case.results("reference", needs)


def assert_equal_up_to_rounding(got: dict, want: dict, tolerance: float = 1e-12) -> None:
    """Relative to the largest element of each result."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        error = (got[name] - value).abs().max().item() if value.numel() else 0.0
        scale = value.abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(scale, 1e-3), f"{name}: error {error:.3e} at scale {scale:.3e}"


def error_ratios(got: dict, torch_result: dict, exact: dict) -> dict[str, tuple[float, float]]:
    """name -> (max, rms) error over that of plain torch in the same dtype, both against float64.

    Errors below half a unit in the last place of the largest element count as that: they are rounding of the result.
    """
    ratios = {}
    for name, value in exact.items():
        floor = 0.5 * torch.finfo(got[name].dtype).eps * value.abs().max()
        ours, theirs = ((result[name].double() - value).abs() for result in (got, torch_result))
        rms = lambda error: error.square().mean().sqrt()  # noqa: E731
        ratios[name] = (
            (ours.max() / torch.maximum(theirs.max(), floor)).item(),
            (rms(ours) / torch.maximum(rms(theirs), floor / 4)).item(),
        )
    return ratios
