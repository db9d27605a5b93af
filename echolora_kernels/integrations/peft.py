"""PEFT's LoRA and DoRA linears as echo targets; saving and loading of ordinary PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import AdapterMismatch
from ..ops.dora_norm.reference import dora_gain
from ..ops.echo_lora_linear import Echo
from .adapters import AdaptedLinear, ReadEcho, check_positions
from .quantised import is_quantised, quantised_gain

_NOT_LINEAR = tuple(
    getattr(lora_layers, name) for name in ("Embedding", "_ConvNd", "ParamWrapper") if hasattr(lora_layers, name)
)


def layers_of_peft(model: nn.Module) -> tuple[list[AdaptedLinear], dict[str, str]]:
    """The LoRA and DoRA layers of PEFT in `model` that wrap a linear, and of each other one why it takes no echo."""
    found: list[AdaptedLinear] = []
    others: dict[str, str] = {}
    attention: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, lora_layers.MultiheadAttention):
            attention.append(name + ".")
            others[name] = "MultiheadAttention reads its weights without calling it"
        elif name.startswith(tuple(attention)):
            others[name] = "MultiheadAttention reads its weights without calling it"
        elif isinstance(module, _NOT_LINEAR):
            others[name] = f"it adapts {type(module.get_base_layer()).__name__}, not a linear"
        else:
            found.append(PeftAdapter(name, module))
    return found, others


class PeftAdapter(AdaptedLinear):
    """A LoRA layer of PEFT. The echo is added to its output, whatever the site.

    The update is linear in its input, so an echo inside it is an echo behind it:
    ``s B A (x + M Delta) = s B A x + M (s B A Delta)``, and with DoRA the gain multiplies both. Only [N, width]
    vectors are transformed, and A, B and the magnitude get their gradient through them.
    """

    def width(self, site: str) -> int:
        module = self.module
        if site == "output":
            return module.out_features
        adapter = self._only_adapter(site)
        return module.in_features if site == "adapter_input" else module.r[adapter]

    def why_inactive(self) -> str | None:
        if self.module.disable_adapters:
            return "its adapters are disabled"
        if self.module.merged:
            return "its adapters are merged"
        if not self._active():
            return f"none of its adapters is active (active: {self.module.active_adapters})"
        return None

    def trainable(self) -> torch.Tensor:
        return next(iter(self.module.lora_A.values())).weight

    def gain(self) -> torch.Tensor | None:
        adapter = self._only_adapter("gain")
        if adapter not in self.module.lora_variant:
            return None
        module = self.module
        if is_quantised(module):
            return quantised_gain(module, adapter)
        return dora_gain(
            transpose(dequantize_module_weight(module.get_base_layer()), getattr(module, "fan_in_fan_out", False)),
            module.lora_A[adapter].weight,
            module.lora_B[adapter].weight,
            module.scaling[adapter],
            module.lora_magnitude_vector[adapter].weight,
        )

    def install(self, read: ReadEcho) -> Any:
        return self.module.register_forward_hook(_AddEcho(self, read))

    def add_to(self, output: torch.Tensor, echo: Echo) -> torch.Tensor:
        """The layer's output, [N, T, d_out], with the echo on top."""
        check_positions(self.name, output, echo)
        behind = Echo(self._behind(echo), echo.mask)
        return (output + behind.spread()).to(output.dtype)

    def _behind(self, echo: Echo) -> torch.Tensor:
        """The echo vectors as they arrive at the output: [N, d_out]."""
        if echo.site == "output":
            return echo.delta
        adapter = self._only_adapter(echo.site)
        module, delta = self.module, echo.delta
        if echo.site == "adapter_input":
            delta = F.linear(delta.to(module.lora_A[adapter].weight.dtype), module.lora_A[adapter].weight)
        delta = F.linear(delta.to(module.lora_B[adapter].weight.dtype), module.lora_B[adapter].weight)
        delta = delta * module.scaling[adapter]
        gain = self.gain()
        return delta if gain is None else gain * delta

    def _active(self) -> list[str]:
        return [adapter for adapter in self.module.active_adapters if adapter in self.module.lora_A]

    def _only_adapter(self, purpose: str) -> str:
        active = self._active()
        if len(active) != 1:
            raise ValueError(f"{self.name}: got active adapters {active}, wants exactly one for {purpose!r}")
        variant = self.module.lora_variant.get(active[0])
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise ValueError(
                f"{self.name}: got the PEFT variant {type(variant).__name__}, wants plain LoRA or DoRA for {purpose!r}"
            )
        return active[0]


class _AddEcho:
    """The hook of a `PeftAdapter`; an object, so that a deep copy of the model has its own."""

    def __init__(self, adapter: PeftAdapter, read: ReadEcho) -> None:
        self._adapter, self._read = adapter, read

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        echo = self._read()
        return None if echo is None else self._adapter.add_to(output, echo)


def load_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Load a saved adapter's weights into `model`, all of them or none.

    Args:
        model: a PeftModel whose adapter has the same configuration as the saved one.
        folder: holds adapter_model.safetensors; pickled files are never read.
        adapter_name: which of the model's adapters receives the weights.

    Raises:
        FileNotFoundError: there is no safetensors file.
        AdapterMismatch: a key is missing or unexpected or has another shape, or the file is damaged; keys are listed
            and nothing is changed.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; only safetensors adapters are read")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise AdapterMismatch(f"{path}: damaged safetensors file ({error})") from error
    check_keys(path, saved, get_peft_model_state_dict(model, adapter_name=adapter_name))
    set_peft_model_state_dict(model, saved, adapter_name=adapter_name)


def check_keys(path: Path, saved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise AdapterMismatch, listing the keys, unless both hold the same keys with the same shapes."""
    problems = {
        "missing": sorted(wanted.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - wanted.keys()),
        "other shape": [
            f"{key} {tuple(saved[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in sorted(saved.keys() & wanted.keys())
            if saved[key].shape != wanted[key].shape
        ],
    }
    listed = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise AdapterMismatch(f"{path}: does not fit the model; " + "; ".join(listed))
