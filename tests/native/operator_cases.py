"""Arguments for the library's operators, called directly: one valid set each, by the names in csrc/library.cpp."""

from __future__ import annotations

import torch

from echolora_kernels import native

N, T, D_IN, D_OUT, R = 2, 5, 7, 6, 3
DROP_BELOW, KEEP_SCALE = 2**22, 4 / 3

NEEDS = ("need_ds", "need_db", "need_dbias", "need_dgain", "need_ddelta")
AT_THE_OUTPUT = ("linear_epilogue",)  # those whose delta lies along d_out
NETWORKS = ("networks_forward", "networks_backward")  # n samples, they know no positions
OPERATORS = (
    "shrink", "linear_epilogue", "linear_forward", "adapter_backward", "lora_a_backward", "input_epilogue",
    "linear_backward", "dora_norm", "drop", "distillation", "distillation_backward", *NETWORKS,
)  # fmt: skip


def schema(operator: str) -> list:
    """The operator's arguments, each with a name, a type and whether it is written."""
    assert not native.why_unavailable()
    return getattr(torch.ops.echolora, operator).default._schema.arguments


def make(operator: str, dtype: torch.dtype = torch.float32, n=N, t=T, d_in=D_IN, d_out=D_OUT) -> dict:
    """Every argument of `operator`, optional ones too; elements in `dtype`, vectors in the accumulator's."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)  # noqa: E731
    broad = lambda *shape: torch.randn(shape, dtype=torch.float64).to(wide)  # noqa: E731
    values = {
        "x": draw(n, t, d_in), "dy": draw(n, t, d_out), "y": draw(n, t, d_out),
        "a": draw(R, d_in), "b": draw(d_out, R), "s": draw(n * t, R), "ds": draw(n * t, R),
        "z": draw(n * t, d_out), "base": draw(n * t, d_out), "product": draw(n * t, d_in), "dx": draw(n * t, d_in),
        "gain": broad(d_in if operator == "shrink" else d_out), "bias": broad(d_out), "mask": broad(n, t),
        "delta": broad(n, d_out if operator in AT_THE_OUTPUT else d_in),
        "weight": draw(d_out, d_in), "magnitude": broad(d_out),
        "off": draw(n, t, d_out), "on": draw(n, t, d_out), "d_off": draw(n, t, d_out), "d_on": draw(n, t, d_out),
        "targets": torch.where(torch.rand(n * t) < 0.3, -100, torch.arange(n * t) % d_out) if d_out else torch.full((n * t,), -100),
        "stats": broad(n * t, 7).abs() + 1, "scales": broad(3), "temperature": 2.0, "off_learns": True, "on_learns": True,
        "scaling": 0.7, "site": 1, "seed": torch.tensor([5]), "drop_below": DROP_BELOW, "keep_scale": KEEP_SCALE,
        "u": draw(n, d_in), "down": draw(4 * R, d_in), "proj_up": draw(2 * d_out + 1, R), "gate_up": draw(2 * d_out + 1, R),
        "gate_bias": draw(2 * d_out + 1), "scale": draw(2), "widths": [d_out, d_out + 1],
        "ddelta": draw(n * (2 * d_out + 1)), "h": broad(n, 4 * R).tanh(),
        "store_z": False, "accumulate": True, "add_low_rank": True, **dict.fromkeys(NEEDS, True),
    }  # fmt: skip
    return {argument.name: values[argument.name] for argument in schema(operator)}


def written(operator: str) -> list[str]:
    """The arguments that the operator writes, by its schema; z only for CUDA tensors."""
    may = [argument.name for argument in schema(operator) if argument.alias_info and argument.alias_info.is_write]
    return [name for name in may if name != "z"]


def call(operator: str, arguments: dict) -> dict[str, torch.Tensor]:
    """Results by number, and what the operator has written, by name."""
    out = getattr(torch.ops.echolora, operator).default(*arguments.values())
    out = () if out is None else out if isinstance(out, tuple | list) else (out,)
    found = {str(index): tensor for index, tensor in enumerate(out)}
    return found | {name: arguments[name] for name in written(operator) if arguments[name] is not None}
