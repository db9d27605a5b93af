"""A LoRA layer of PEFT whose forward is our operator wherever that computes the same, and PEFT's own elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd import forward_ad

from ..functional import echo_lora_linear
from ..ops.echo_lora_linear.rows import autocast_dtype
from .quantised import is_quantised, quantised_fits, quantised_forward, why_not_quantised, why_not_quantised_adapter

MAX_RANK = 256  # of every set of kernels
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (torch.Tensor, nn.Parameter)  # not quantised, not a shard


class FusedForward:
    """What stands in a fused layer's `__dict__` as its forward; an object, so that deepcopy and pickle follow it.

    Every call decides anew from the module as it is then. Parameters are read nowhere else: outside the module's own
    forward they may be sharded.

    Attributes:
        group: the `grouped.Group` that it is a member of, or None.
    """

    def __init__(self, module: Any, backend: str | None) -> None:
        self.module, self.backend = module, backend
        self.group: Any = None

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # anything beside x has a meaning that only PEFT's forward knows: adapter_names, alora_offsets
        if not args and not kwargs and is_quantised(self.module):
            name = only_adapter(self.module)
            if name is not None and quantised_fits(self.module, name, x):
                unseen = not _is_hooked(self.module.base_layer)
                return quantised_forward(self.module, name, x, overwrite_base=unseen, backend=self.backend)
        arguments = None if args or kwargs else operator_arguments(self.module, x)
        if arguments is None:
            return type(self.module).forward(self.module, x, *args, **kwargs)
        together = None if self.group is None else self.group.output(self, x, arguments)
        if together is not None:
            return together
        return echo_lora_linear(x, **arguments, backend=self.backend)


def lora_layers_of(model: nn.Module) -> dict[str, tuple[Any, str | None]]:
    """name -> (LoRA layer of PEFT, why it can never be fused, or None), of the whole model."""
    found: dict[str, tuple[Any, str | None]] = {}
    attention: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name.startswith(tuple(attention)):
            reason: str | None = "MultiheadAttention reads its weights without calling it"
        else:
            reason = why_not_layer(module)
        if isinstance(module, lora_layers.MultiheadAttention):
            attention.append(name + ".")
        found[name] = module, reason
    return found


def why_not_layer(module: Any) -> str | None:
    """Why no adapter of this LoRA layer can be computed by our operator."""
    if is_quantised(module):
        return why_not_quantised(module)
    if type(module).forward is not lora_layers.Linear.forward:
        return f"PEFT's {type(module).__name__} is not its plain Linear"
    base = module._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}, not a plain Linear"
    if module.fan_in_fan_out:
        return "the weight is transposed (fan_in_fan_out)"
    weight = base.weight
    if not weight.is_floating_point() or _is_quantised(weight):
        return f"the weight is quantised ({type(weight).__name__}, {weight.dtype})"
    return "the base layer has hooks or a replaced forward" if _is_hooked(base) else None


def why_not_adapter(module: Any, name: str) -> str | None:
    """Why one adapter of a layer that can be fused is left to PEFT."""
    variant, dropout = module.lora_variant.get(name), _part(module, "lora_dropout", name)
    a, b = _part(module, "lora_A", name), _part(module, "lora_B", name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"the variant {type(variant).__name__} is neither plain LoRA nor DoRA"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
        return "its parts are not plain Linear and Dropout modules"
    if module.r[name] > MAX_RANK:
        return f"rank {module.r[name]} is above {MAX_RANK}"
    apart = is_quantised(module)  # then a lora_bias is added by itself, in whatever dtype
    bias = b.bias
    if bias is not None and (variant is not None or not (apart or bias.dtype == module.base_layer.weight.dtype)):
        return f"a lora_bias in {bias.dtype} cannot be added to a bias in {module.base_layer.weight.dtype}"
    if isinstance(module.scaling[name], torch.Tensor):  # may change without a new compilation
        return "its scaling is a tensor, which adapters swapped under torch.compile have"
    if getattr(dropout, "p", 0.0) >= 1.0:
        return "its dropout drops everything"
    if any(_is_hooked(part) for part in (a, b, dropout)):
        return "its parts have hooks or a replaced forward"
    return why_not_quantised_adapter(module, name) if apart else None


def _part(module: Any, kind: str, name: str) -> Any:
    """What `module.KIND[name]` is; nn.Module's own way there takes microseconds, many times a call."""
    return module._modules[kind]._modules[name]


def only_adapter(module: Any) -> str | None:
    """The adapter whose update our operators can compute in this call; None where PEFT has to."""
    if module.disable_adapters or module.merged or why_not_layer(module) is not None:
        return None
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:  # kernels cannot be seen into
        return None
    adapters = module._modules["lora_A"]._modules
    active = [name for name in module.active_adapters if name in adapters]
    return active[0] if len(active) == 1 and why_not_adapter(module, active[0]) is None else None


def operator_arguments(module: Any, x: torch.Tensor) -> dict[str, Any] | None:
    """What `echo_lora_linear` takes besides x, where it computes what PEFT's forward would now; else None."""
    name = only_adapter(module)
    if name is None or is_quantised(module):
        return None
    base, up = module._modules["base_layer"], _part(module, "lora_B", name)
    weight, bias, lora_b, lora_bias = base.weight, base.bias, up.weight, up.bias
    lora_a = _part(module, "lora_A", name).weight
    scaling, dropout = module.scaling[name], _part(module, "lora_dropout", name)
    magnitude = _part(module, "lora_magnitude_vector", name).weight if name in module.lora_variant else None
    dropped = dropout.training and (magnitude is None or module.training)  # as PEFT: DoRA looks at the layer too
    dropout_p = getattr(dropout, "p", 0.0) if dropped else 0.0
    tensors = [t for t in (x, weight, bias, lora_a, lora_b, magnitude) if t is not None]
    if x.is_nested or any(type(t) not in _PLAIN for t in tensors):  # shards
        return None
    if not _dtypes_fit(module, x, weight, bias, lora_a, lora_b):
        return None
    if weight.requires_grad and magnitude is not None and dropout_p > 0:  # the kernels have no such gradient
        return None
    if lora_bias is not None:
        bias = scaling * lora_bias if bias is None else bias + scaling * lora_bias
    return {
        "weight": weight,
        "bias": bias,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": scaling,
        "dropout_p": dropout_p,
        "magnitude": magnitude,
    }


def _dtypes_fit(
    module: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
) -> bool:
    """Whether the operator takes these dtypes and PEFT's casts are its own: adapters may be wider than x."""
    autocast = autocast_dtype(x.device.type)
    computed = autocast or x.dtype
    if autocast:  # which leaves float64 alone
        fits = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    else:
        fits = all(t is None or t.dtype == x.dtype for t in (weight, bias))
        fits = fits and (module.cast_input_dtype_enabled or lora_a.dtype == x.dtype)
    wide_enough = torch.promote_types(computed, lora_a.dtype) == lora_a.dtype
    return fits and computed in _DTYPES and lora_a.dtype == lora_b.dtype and wide_enough


def _is_quantised(weight: torch.Tensor) -> bool:
    """Whether the weight is a tensor subclass other than a shard, which is whole within the module's forward."""
    return type(weight) not in _PLAIN and type(weight).__name__ not in ("DTensor", "FakeTensor")


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module would do more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
