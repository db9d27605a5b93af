"""What is verified: every operator, over shapes and options."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .layers import Member, linears, networks, updates
from .losses import loss
from .trials import Trial


@dataclass(frozen=True)
class Check:
    """One operator with some options at one shape.

    Args:
        draws: how many trials are pooled.
        make: backend, device and dtype to a trial, drawn from torch's generator.
        quick: whether it is of the quick part.
    """

    operator: str
    options: str
    shape: str
    draws: int
    make: Callable[[str, torch.device, torch.dtype], Trial]
    quick: bool = False


def checks(quick: bool, small: bool) -> list[Check]:
    """All of them, or the quick part; `small` for Triton's interpreter."""
    found = itertools.chain(_linears(small), _groups(small), _updates(small), _networks(small), _losses(small))
    return [check for check in found if check.quick or not quick]


# small results have at least 70 numbers in four draws: see `Errors`
_SHAPES = ((15, 12, 150, 141, 12), (8, 16, 192, 128, 40))  # the second is never "small" for Triton
_SMALL_SHAPES = ((15, 6, 75, 70, 12),)
# where nothing is interpreted: in float32 longer than a launch takes, so that "small" is several launches
_MIDDLE = {False: ((4, 128, 640, 520, 16),), True: ()}
_QUICK = {(None, False, 0.0), ("output", False, 0.1), ("rank", True, 0.1), ("adapter_input", True, 0.0)}


def _linears(small: bool) -> Iterator[Check]:
    shapes = _SMALL_SHAPES if small else _SHAPES
    options = [
        (*option, "exact")
        for option in itertools.product((None, "output", "adapter_input", "rank"), (False, True), (0.0, 0.1))
    ]
    options += [("output", True, 0.1, "fast")]
    for shape, (site, dora, p, mode) in itertools.product(shapes, options):
        n, t, d_in, d_out, r = shape
        text = _text(("DoRA" if dora else "LoRA") + (" fast" if mode == "fast" else ""), site, p)
        quick = shape is shapes[0] and mode == "exact" and (site, dora, p) in _QUICK
        make = functools.partial(
            linears, n=n, t=t, d_in=d_in, members=[Member(d_out, r, site, dora)], dropout_p=p, dora_dropout=mode
        )
        yield Check("echo_lora_linear", text, f"[{n}, {t}, {d_in}] to {d_out}, rank {r}", 4, make, quick)
    # what most training is, and has kernels of its own where a layer is small
    for (n, t, d_in, d_out, r), p in itertools.product((shapes[0], *_MIDDLE[small]), (0.0, 0.1)):
        member = Member(d_out, r, bias=False)
        make = functools.partial(linears, n=n, t=t, d_in=d_in, members=[member], dropout_p=p)
        text, quick = "LoRA, no bias" + _dropout(p), n == shapes[0][0] and p > 0
        yield Check("echo_lora_linear", text, f"[{n}, {t}, {d_in}] to {d_out}, rank {r}", 4, make, quick)


def _groups(small: bool) -> Iterator[Check]:
    n, t, d_in = (15, 6, 75) if small else (15, 12, 150)
    widths = (70, 48, 33) if small else (141, 96, 65)
    kinds = {
        "LoRA": ((None, False),) * 3,
        "LoRA, no bias": ((None, False),) * 3,
        "LoRA, echo at output": (("output", False),) * 3,
        "DoRA": ((None, True),) * 3,
        "LoRA and DoRA, echo at rank, output and adapter_input": (
            ("rank", False),
            ("output", True),
            ("adapter_input", False),
        ),
    }
    for (text, kind), p in itertools.product(kinds.items(), (0.0, 0.1)):
        biases = (False,) * 3 if "no bias" in text else (True, False, True)
        members = [
            Member(width, r, site, dora, bias, scaling)
            for (site, dora), width, r, bias, scaling in zip(
                kind, widths, (12, 8, 16), biases, (0.5, 0.8, 1.1), strict=True
            )
        ]
        make = functools.partial(linears, n=n, t=t, d_in=d_in, members=members, dropout_p=p)
        shape = f"[{n}, {t}, {d_in}] to {', '.join(map(str, widths))}"
        quick = p > 0 and (len(set(kind)) > 1 or "no bias" in text)
        yield Check("echo_lora_linear_group", text + _dropout(p), shape, 4, make, quick)


def _updates(small: bool) -> Iterator[Check]:
    for (n, t, d_in, d_out, r), gain, p in itertools.product(
        _SMALL_SHAPES if small else _SHAPES, (False, True), (0.0, 0.1)
    ):
        make = functools.partial(updates, n=n, t=t, d_in=d_in, d_out=d_out, r=r, gain=gain, dropout_p=p)
        shape = f"[{n}, {t}, {d_in}] to {d_out}, rank {r}"
        yield Check(
            "lora_update", ("with a gain" if gain else "") + _dropout(p), shape, 4, make, n == 15 and gain and p > 0
        )


def _networks(small: bool) -> Iterator[Check]:
    for n, d, m, widths in ((9, 48, 12, (33, 20) * 4), (16, 96, 32, (64, 32) * 4))[: 1 if small else None]:
        make = functools.partial(networks, n=n, d=d, m=m, widths=widths)
        shape = f"[{n}, {d}], bottleneck {m}, {len(widths)} modules"
        yield Check("echo_networks", "", shape, 8, make, n == 9)


def _losses(small: bool) -> Iterator[Check]:
    vocabulary = 500 if small else 1500
    options: dict[str, dict] = {
        "not routed": {"routed": False},
        "kd_detach on": {"kd_detach": "on"},
        "kd_detach none, branches near": {"kd_detach": "none", "near": 0.01, "temperature": 1.0},
        "kd_detach off, num_items": {"kd_detach": "off", "kd_weight": 0.3, "num_items": 11},
    }
    where = {
        "echo_distillation": {"shape": (2, 5), "vocabulary": vocabulary},
        "echo_distillation_rows": {"shape": (7,), "vocabulary": vocabulary},
        "echo_distillation_linear": {"shape": (12,), "vocabulary": 400, "width": 64, "chunk_rows": 5},
    }
    for (operator, sizes), (text, chosen) in itertools.product(where.items(), options.items()):
        make = functools.partial(_loss, operator, {**sizes, **chosen})
        shape = f"{list(sizes['shape'])}, vocabulary {sizes['vocabulary']}"  # type: ignore[call-overload]
        yield Check(operator, text, shape, 64, make, text.startswith("kd_detach none"))


def _loss(operator: str, options: dict, backend: str, device: torch.device, dtype: torch.dtype) -> Trial:
    return loss(operator, backend, device, dtype, **options)


def _text(adapter: str, site: str | None, p: float) -> str:
    return adapter + (f", echo at {site}" if site else "") + _dropout(p)


def _dropout(p: float) -> str:
    return f", dropout {p}" if p else ""
