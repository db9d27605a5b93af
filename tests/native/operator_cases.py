"""Arguments for the library's operators, called directly: one valid set each, by the names in csrc/library.cpp."""

from __future__ import annotations

import torch

N, T, D_IN, D_OUT, R = 2, 5, 7, 6, 3
DROP_BELOW, KEEP_SCALE = 2**22, 4 / 3

NEEDS = ("need_ds", "need_db", "need_dbias", "need_dgain", "need_ddelta")
# those whose delta lies along d_out
AT_THE_OUTPUT = ("linear_epilogue",)

# arguments in the order of the operator's schema
OPERATORS = {
    "shrink": "x a scaling seed drop_below keep_scale gain site delta mask",
    "linear_epilogue": "s b z base gain bias delta mask y store_z",
    "adapter_backward": "dy s b scaling gain z mask " + " ".join(NEEDS),
    "lora_a_backward": "x ds seed drop_below keep_scale delta mask",
    "input_epilogue": "ds a product seed drop_below keep_scale accumulate dx",
    "linear_forward": "x a b scaling seed drop_below keep_scale site delta mask z base gain bias y store_z",
    "linear_backward": "dy s b scaling gain z mask x a seed drop_below keep_scale delta product dx " + " ".join(NEEDS),
    "dora_norm": "weight a b scaling magnitude",
    "drop": "x seed drop_below keep_scale",
}


def overload(name: str):
    """The operator, or None where the library has none of that name."""
    packet = getattr(torch.ops.echolora, name, None)
    return None if packet is None else packet.default


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
        "scaling": 0.7, "site": 1, "seed": torch.tensor([5]), "drop_below": DROP_BELOW, "keep_scale": KEEP_SCALE,
        "store_z": True, "accumulate": True, **dict.fromkeys(NEEDS, True),
    }  # fmt: skip
    return {name: values[name] for name in OPERATORS[operator].split()}


def written(operator: str) -> list[str]:
    """The arguments that the operator may write, by its schema."""
    arguments = overload(operator)._schema.arguments
    return [argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]


def call(operator: str, arguments: dict) -> dict[str, torch.Tensor]:
    """Results by number, and what the operator has written, by name."""
    out = overload(operator)(*arguments.values())
    out = () if out is None else out if isinstance(out, tuple | list) else (out,)
    found = {str(index): tensor for index, tensor in enumerate(out)}
    return found | {name: arguments[name] for name in written(operator) if arguments[name] is not None}
