"""The method around the operators: configure, collect, route, inject, distil.

`config` holds every choice; `route` draws whether a step uses the echo; `collect` pools boundary states; `inject`
brings the echo into the adapted linears; `two_pass` is the step itself; `model` is the wrapper a user sees.
"""

from .config import EchoConfig
from .model import EchoLoRA
from .output import EchoLoRAOutput

__all__ = ["EchoConfig", "EchoLoRA", "EchoLoRAOutput"]
