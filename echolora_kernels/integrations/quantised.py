"""LoRA layers of PEFT on quantised linears: the base product by the library's own layer, the update by our operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..functional import lora_update
from ..ops.dora_norm.reference import dora_norm
from ..ops.echo_lora_linear.rows import autocast_dtype

# PEFT's layer -> the layers that may be its base
_BASES = {
    "peft.tuners.lora.bnb.Linear4bit": (
        "bitsandbytes.nn.modules.Linear4bit",
        "bitsandbytes.nn.modules.LinearNF4",
        "bitsandbytes.nn.modules.LinearFP4",
    ),
    "peft.tuners.lora.bnb.Linear8bitLt": ("bitsandbytes.nn.modules.Linear8bitLt",),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("torch.nn.modules.linear.Linear",),
}
_CHUNK = 1 << 22  # elements of a weight that are dequantised at a time
_REPACKED = (
    "bitsandbytes has repacked a 4-bit weight for inference on CPUs, and knows neither gradient nor value of it: load the "
    "model again, and set support_avx512bf16_for_cpu to False on its Linear4bit layers before evaluating it"
)


def is_quantised(module: Any) -> bool:
    """Whether this is one of PEFT's LoRA layers for bitsandbytes or torchao, which are known without importing them."""
    return _name(module) in _BASES


def why_not_quantised(module: Any) -> str | None:
    """Why no adapter of such a layer can be computed by our operator."""
    base = module.base_layer
    if _name(base) not in _BASES[_name(module)]:
        return f"the base layer is a {type(base).__name__}, not the quantisation library's own"
    if getattr(getattr(base, "state", None), "has_fp16_weights", False):
        return "the 8-bit layer keeps its weight in 16 bits (has_fp16_weights)"
    return None


def why_not_quantised_adapter(module: Any, name: str) -> str | None:
    """Why one adapter of such a layer is left to PEFT, beyond what goes for any layer."""
    if name in module.lora_variant and type(module.lora_dropout[name]) is nn.Dropout:
        return "dropout with DoRA takes a second product with the quantised weight"
    return None


def quantised_fits(module: Any, name: str, x: torch.Tensor) -> bool:
    """Whether the operator takes these dtypes, and its update is as wide as PEFT's or wider."""
    weights = [module.lora_A[name].weight, module.lora_B[name].weight]
    if name in module.lora_variant:
        weights.append(module.lora_magnitude_vector[name].weight)
        if _repacked(module.base_layer):  # and dequantised no more
            return False
    if any(type(weight) is not nn.Parameter for weight in weights) or not x.is_floating_point():  # shards
        return False
    lora_a, lora_b = (weight.dtype for weight in weights[:2])
    autocast = autocast_dtype(x.device.type)
    computed = autocast or x.dtype
    cast = autocast is not None or module.cast_input_dtype_enabled or lora_a == x.dtype
    return cast and lora_a == lora_b and torch.promote_types(computed, lora_a) == lora_a


def quantised_forward(
    module: Any, name: str, x: torch.Tensor, *, overwrite_base: bool, backend: str | None
) -> torch.Tensor:
    """What PEFT's forward computes with the one adapter `name`.

    Args:
        overwrite_base: whether nobody else gets to see what the base layer returns.

    Raises:
        RuntimeError: bitsandbytes has repacked the weight, and x wants a gradient.
    """
    if x.requires_grad and torch.is_grad_enabled() and _repacked(module.base_layer):
        raise RuntimeError(_REPACKED)
    lora_b, scaling, dropout = module.lora_B[name], module.scaling[name], module.lora_dropout[name]
    base, gain = module.base_layer(x), None
    bias = None if lora_b.bias is None else scaling * lora_b.bias
    if name in module.lora_variant:
        gain = quantised_gain(module, name)
        bias = module.base_layer.bias
        bias = None if bias is None else (1 - gain) * bias  # base has it already, and no gain is to scale it
    return lora_update(
        base,
        x,
        module.lora_A[name].weight,
        lora_b.weight,
        scaling,
        gain=gain,
        bias=bias,
        dropout_p=getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        overwrite_base=overwrite_base,
        backend=backend,
    )


def quantised_gain(module: Any, name: str) -> torch.Tensor:
    """DoRA's magnitude over the row norms of the dequantised W0 + s B A, [d_out]."""
    lora_a, lora_b = module.lora_A[name].weight, module.lora_B[name].weight
    norms, start = [], 0
    for rows in dequantised_rows(module.base_layer):
        norms.append(dora_norm(rows, lora_a, lora_b[start : start + len(rows)], module.scaling[name]))
        start += len(rows)
    norm = torch.cat(norms)
    return module.lora_magnitude_vector[name].weight / norm.clamp_min(torch.finfo(norm.dtype).tiny)


@torch.no_grad()
def dequantised_rows(base: Any, chunk: int = _CHUNK) -> Iterator[torch.Tensor]:
    """The weight of a quantised layer, some whole rows at a time: at most `chunk` elements, where rows allow it.

    Raises:
        RuntimeError: bitsandbytes cannot dequantise it any more.
    """
    kind = type(base.weight).__name__
    if _repacked(base):
        raise RuntimeError(_REPACKED)
    if kind == "Params4bit":
        yield from _rows_of_4bit(base.weight, chunk)
    elif kind == "Int8Params":
        yield from _rows_of_8bit(base, chunk)
    else:
        step = max(1, chunk // base.in_features)
        for start in range(0, base.out_features, step):
            yield base.weight[start : start + step].dequantize()


def _rows_of_4bit(weight: Any, chunk: int) -> Iterator[torch.Tensor]:
    from bitsandbytes import functional

    state = weight.quant_state
    (d_out, d_in), block, absmax = state.shape, state.blocksize, state.absmax
    if d_in % block:  # blocks that share a scale go on from one row to the next
        yield functional.dequantize_4bit(weight.data, state)
        return
    if state.nested:
        absmax = (functional.dequantize_blockwise(absmax, state.state2) + state.offset).float()
    packed = weight.detach().as_subclass(torch.Tensor).view(torch.uint8).flatten()
    step = max(1, chunk // d_in)
    for start in range(0, d_out, step):
        stop = min(start + step, d_out)
        part = functional.QuantState(
            absmax=absmax[start * d_in // block : stop * d_in // block],
            shape=torch.Size((stop - start, d_in)),
            code=state.code,
            blocksize=block,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield functional.dequantize_4bit(packed[start * d_in // 2 : stop * d_in // 2].unsqueeze(1), part)


def _rows_of_8bit(base: Any, chunk: int) -> Iterator[torch.Tensor]:
    from bitsandbytes import functional

    held = base.weight if base.state.CB is None else base.state  # the first forward takes them from the weight
    values, scales = held.CB, held.SCB
    step = max(1, chunk // values.shape[1])
    for part, scale in zip(values.split(step), scales.split(step), strict=True):
        yield functional.int8_vectorwise_dequant(part, scale)


def _repacked(base: Any) -> bool:
    """Whether this is a 4-bit layer that bitsandbytes has turned to inference, which it does by itself on some CPUs."""
    return getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
