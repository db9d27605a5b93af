"""Echo-LoRA, LoRA and DoRA training: reference layers, the method, and the operators behind them.

Importing this package needs torch alone.
"""

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
