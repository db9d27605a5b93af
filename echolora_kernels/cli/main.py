"""Entry point of `echolora`: commands, and errors in one line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exit status 1 for errors a user can mend."""
    try:
        import typer

        from .app import app
    except ImportError as error:
        sys.exit(f"echolora: {error.name or error} is missing; pip install 'echolora-kernels[train]'")
    debug = "--debug" in sys.argv or bool(os.environ.get("ECHOLORA_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        typer.main.get_command(app)(args=arguments, prog_name="echolora")
    except Exception as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")  # of several processes, whose messages come in one terminal
        where = "" if rank == "0" else f" (rank {rank})"
        sys.exit(f"echolora{where}: {_one_line(error)} (--debug shows where)")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
