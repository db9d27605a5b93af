"""Echo-LoRA, LoRA and DoRA training: reference layers, the method, and the operators behind them.

Importing this package needs torch alone.
"""

from typing import Any

from . import functional, losses, reference
from .batches import EchoDataCollator, PromptLengthSampler
from .errors import (
    AdapterMismatch,
    BackendUnavailable,
    CheckpointError,
    DataError,
    EchoLoRAError,
    NonFiniteLoss,
)
from .integrations.fuse import FuseReport, fuse, unfuse
from .layers import EchoLoRALinear, EchoNetworks
from .method import EchoConfig, EchoLoRA, EchoLoRAOutput
from .ops.echo_lora_linear import Echo
from .version import __version__

__all__ = [
    "AdapterMismatch",
    "BackendUnavailable",
    "CheckpointError",
    "DataError",
    "Echo",
    "EchoConfig",
    "EchoDataCollator",
    "EchoLoRA",
    "EchoLoRAError",
    "EchoLoRALinear",
    "EchoLoRAOutput",
    "EchoNetworks",
    "FuseReport",
    "NonFiniteLoss",
    "PromptLengthSampler",
    "__version__",
    "functional",
    "fuse",
    "losses",
    "reference",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name in ("EchoCallback", "EchoTrainer", "EchoTrainerMixin"):  # need transformers
        from .integrations import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
