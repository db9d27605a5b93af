"""The operators in plain PyTorch, float64-clean: same signatures as `functional`, without `backend`."""

from .ops.dora_norm.reference import dora_norm
from .ops.echo_distillation.reference import echo_distillation
from .ops.echo_lora_linear.reference import echo_lora_linear
from .ops.echo_network.reference import echo_network

__all__ = ["dora_norm", "echo_distillation", "echo_lora_linear", "echo_network"]
