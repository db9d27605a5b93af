"""The commands."""

from __future__ import annotations

import typer

from .. import __version__
from .doctor import doctor
from .export import export
from .train import train
from .tune import SETTINGS, tune
from .verify import verify

app = typer.Typer(
    help="Fine-tune language models with Echo-LoRA, LoRA and DoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes with every command."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


app.command(name="train", no_args_is_help=True)(train)
app.command(name="export", no_args_is_help=True)(export)
app.command(name="doctor")(doctor)
app.command(name="verify")(verify)
app.command(name="tune", context_settings=SETTINGS)(tune)
