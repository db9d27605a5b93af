"""The adapted linears of a model, whichever library made them, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers.linear import EchoLoRALinear
from ..ops.echo_lora_linear import Echo
from .versions import want_supported

ReadEcho = Callable[[], Echo | None]


class AdaptedLinear(ABC):
    """One linear with an adapter that can receive an echo.

    Attributes:
        name: its name in the model. module: the module itself.
    """

    module: Any

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @abstractmethod
    def width(self, site: str) -> int:
        """Width of the echo at `site`; raises ValueError where the adapter cannot take one there."""

    @abstractmethod
    def why_inactive(self) -> str | None:
        """Why the adapter does not take part in the forward pass at the moment, or None."""

    @abstractmethod
    def gain(self) -> torch.Tensor | None:
        """DoRA's factor on each output, [d_out]; None without DoRA."""

    @abstractmethod
    def install(self, read: ReadEcho) -> Any:
        """Make every forward pass of the module ask `read()` for its echo; returns a handle with `remove()`."""

    @abstractmethod
    def trainable(self) -> torch.Tensor:
        """One of the adapter's parameters; tells the device and dtype of all of them."""


class NativeAdapter(AdaptedLinear):
    """An `EchoLoRALinear`: the echo goes into its forward."""

    module: EchoLoRALinear

    def width(self, site: str) -> int:
        layer = self.module
        return {"output": layer.out_features, "adapter_input": layer.in_features, "rank": layer.r}[site]

    def why_inactive(self) -> str | None:
        return "it is merged" if self.module.merged else None

    def trainable(self) -> torch.Tensor:
        return self.module.lora_A

    def gain(self) -> torch.Tensor | None:
        return self.module.gain()

    def install(self, read: ReadEcho) -> Any:
        return self.module.register_forward_pre_hook(_PassEcho(self.name, read), with_kwargs=True)


class _PassEcho:
    """The hook of a `NativeAdapter`; an object, so that a deep copy of the model has its own."""

    def __init__(self, name: str, read: ReadEcho) -> None:
        self._name, self._read = name, read

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        echo = self._read()
        if echo is None:
            return None
        check_positions(self._name, args[0] if args else kwargs["x"], echo)
        return args, {**kwargs, "echo": echo}


def adapted_linears(model: nn.Module) -> list[AdaptedLinear]:
    """Every adapted linear of `model`: `EchoLoRALinear` modules and the linear LoRA layers of PEFT.

    Raises:
        ImportError: the model has layers of PEFT, whose version is not supported.
    """
    native = [
        NativeAdapter(name, module) for name, module in model.named_modules() if isinstance(module, EchoLoRALinear)
    ]
    return [*native, *_layers_of_peft(model)[0]]


def layers_without_echo(model: nn.Module) -> dict[str, str]:
    """name -> why it takes no echo, of every LoRA layer that is not among `adapted_linears`."""
    return _layers_of_peft(model)[1]


def _layers_of_peft(model: nn.Module) -> tuple[list[AdaptedLinear], dict[str, str]]:
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    if not any(kind.__module__.startswith("peft.") for kind in kinds):
        return [], {}
    want_supported("peft")
    from .peft import layers_of_peft

    return layers_of_peft(model)


def check_positions(name: str, tensor: torch.Tensor, echo: Echo) -> None:
    """Raise unless `tensor` is [N, T, ...] over the same samples and positions as the echo's mask."""
    if tensor.ndim != 3 or tensor.shape[:2] != echo.mask.shape:
        raise ValueError(
            f"{name}: got activations of shape {tuple(tensor.shape)}, wants [{echo.mask.shape[0]}, "
            f"{echo.mask.shape[1]}, width] as the batch; leave it out of target_modules"
        )
