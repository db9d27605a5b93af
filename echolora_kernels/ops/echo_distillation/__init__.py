"""Cross-entropy of both branches and the masked distillation between them."""

from .result import IGNORE_INDEX, KD_DETACH, EchoLosses

__all__ = ["IGNORE_INDEX", "KD_DETACH", "EchoLosses"]
