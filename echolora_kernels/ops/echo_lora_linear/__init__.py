"""Linear layer + LoRA/DoRA update + echo injection: y = W0 x + bias + s B A drop(x) + M Delta."""

from .checks import DORA_DROPOUTS
from .echo import SITES, Echo
from .projection import Projection

__all__ = ["DORA_DROPOUTS", "SITES", "Echo", "Projection"]
