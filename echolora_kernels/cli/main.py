"""Entry point of `echolora`: commands, and errors in one line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line; exit status 2 for errors a user can mend, as for a flag that does not exist."""
    try:
        import typer

        from .app import app
    except ImportError as error:
        _refuse(f"echolora: {error.name or error} is missing, which the extra [train] brings")
    debug = "--debug" in sys.argv or bool(os.environ.get("ECHOLORA_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        typer.main.get_command(app)(args=arguments, prog_name="echolora")
    except Exception as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")  # of several processes, whose messages come in one terminal
        where = "" if rank == "0" else f" (rank {rank})"
        _refuse(f"echolora{where}: {_one_line(error)} (--debug shows where)")


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
