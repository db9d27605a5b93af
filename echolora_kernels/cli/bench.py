"""`echolora bench`."""

from __future__ import annotations

import typer

from .show import interruptible


def bench(context: typer.Context) -> None:
    """Time layers, losses, echo networks and steps beside their peers and the device's floor."""
    from ..benchmarks.command import main  # loads what the other commands do not need

    with interruptible():
        raise typer.Exit(main(context.args))
