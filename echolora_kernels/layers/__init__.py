"""Modules that hold the parameters and call the operators."""

from .linear import EchoLoRALinear
from .network import EchoNetworks

__all__ = ["EchoLoRALinear", "EchoNetworks"]
