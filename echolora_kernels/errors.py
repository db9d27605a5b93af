"""The exceptions of this package; each derives from the built-in a caller would expect."""


class EchoLoRAError(Exception):
    """Base of every exception that is particular to this package."""


class BackendUnavailable(EchoLoRAError, RuntimeError):
    """A backend was named explicitly and cannot run here; the message says why."""


class DataError(EchoLoRAError, ValueError):
    """A data file cannot be read; the message names the file, the place and the reason."""


class AdapterMismatch(EchoLoRAError, ValueError):
    """A saved adapter does not fit the model; the message lists the keys."""


class CheckpointError(EchoLoRAError, RuntimeError):
    """A training checkpoint is missing, damaged, or belongs to another run."""


class NonFiniteLoss(EchoLoRAError, ArithmeticError):
    """The loss became NaN or infinite; the message says at which step."""
