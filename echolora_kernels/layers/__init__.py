"""Modules that hold the parameters and call the operators."""

from .linear import EchoLoRALinear
from .network import EchoNetwork

__all__ = ["EchoLoRALinear", "EchoNetwork"]
