"""`echolora tune`."""

from __future__ import annotations

import typer

from ..tuning.command import main
from .show import progress

# its options are those of `tuning.command`, which reads them without typer
SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


def tune(context: typer.Context) -> None:
    """Time the ways to compute a model's large products on this GPU, and keep the fastest in a table.

    Example: echolora tune --shapes llama3-8b --install
    """
    raise typer.Exit(main(context.args, progress))
