"""Arguments for `echo_lora_linear_group`: one `Case` a projection."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from linear_cases import SEED, keep_mask, make

from echolora_kernels import Echo
from echolora_kernels.functional import echo_lora_linear_group
from echolora_kernels.ops.echo_lora_linear import Projection, reference

WIDTHS, RANKS = (21, 13, 34), (3, 5, 16)
SITES_OF_THREE = [
    (None, None, None),
    ("output", "output", None),
    ("rank", "output", "adapter_input"),
    ("adapter_input", "adapter_input", "adapter_input"),
]
DORA_OF_THREE = [(False, False, False), (True, True, True), (False, True, False)]


def cases(
    backend,
    sites=("output", "output", None),
    dora=(False, True, False),
    p=0.0,
    dtype=torch.float64,
    ranks=RANKS,
    **sizes,
):
    """One `Case` a projection; they share x, the mask and the dropout."""
    made = [
        make(backend, site=site, dora=d, d_out=d_out, r=r, p=p, dtype=dtype, bias=index != 1, **sizes)
        for index, (site, d, d_out, r) in enumerate(zip(sites, dora, WIDTHS, ranks, strict=True))
    ]
    first = made[0]
    mask = next((case.mask for case in made if case.mask is not None), None)
    return [
        replace(case, x=first.x, mask=mask if case.mask is not None else None, scaling=0.5 + 0.3 * index)
        for index, case in enumerate(made)
    ]


def leaves(group, needs):
    x = group[0].x.detach().requires_grad_("x" in needs)
    each = [{n: t.detach().requires_grad_(n in needs) for n, t in case.tensors().items() if n != "x"} for case in group]
    return x, each


def together(
    group,
    backend,
    needs=("x", "bias", "lora_a", "lora_b", "magnitude", "delta"),
    mode="exact",
    forward_in=None,
    backward_in=None,
):
    """Every y and every gradient, by name and projection; each pass inside a context, where one is given."""
    x, each = leaves(group, needs)
    projections = [
        Projection(
            t["weight"], t.get("bias"), t["lora_a"], t["lora_b"], case.scaling, t.get("magnitude"),
            None if case.site is None else Echo(t["delta"], case.mask, case.site),
        )
        for case, t in zip(group, each, strict=True)
    ]  # fmt: skip
    torch.manual_seed(SEED)
    with forward_in or nullcontext():
        ys = echo_lora_linear_group(x, projections, dropout_p=group[0].dropout_p, dora_dropout=mode, backend=backend)
    wanted = {f"{n}{i}": t for i, tensors in enumerate(each) for n, t in tensors.items() if t.requires_grad}
    if x.requires_grad:
        wanted["x"] = x
    with backward_in or nullcontext():
        grads = torch.autograd.grad(ys, list(wanted.values()), [case.dy for case in group]) if wanted else ()
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(wanted, grads, strict=True))


def by_reference(backend, group, monkeypatch, mode="exact"):
    """The reference, given the backend's dropout mask."""
    p = group[0].dropout_p
    if p:
        keep = keep_mask(backend, group[0])
        drop = lambda x, p: x * keep.to(x.dtype) / (1 - p)  # noqa: E731
        monkeypatch.setattr(reference.F, "dropout", drop)
    return together(group, "reference", mode=mode)
