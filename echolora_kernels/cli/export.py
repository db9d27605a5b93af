"""`echolora export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Argument, Option

from ..integrations.versions import want_supported
from .show import RunDisplay, interruptible, quiet_libraries

_DTYPES = ("float32", "bfloat16", "float16")


def export(
    adapter: Annotated[Path, Argument(metavar="ADAPTER_OR_RUN", help="A PEFT adapter's folder, or a finished run's.", show_default=False)],
    output: Annotated[Path, Option(help="Folder to write; must be new or empty.")],
    model: Annotated[str | None, Option(help="The base model, as train takes it; by default the one that the adapter names.")] = None,
    merged: Annotated[bool, Option("--merged", help="Write the merged model and its tokenizer instead of the adapter.")] = False,
    dtype: Annotated[str, Option(help=f"Of the model and of merged weights: {', '.join(_DTYPES)}.")] = _DTYPES[0],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier export in --output.")] = False,
    json_output: Annotated[bool, Option("--json", help="Print JSON instead of text.")] = False,
) -> None:  # fmt: skip
    """Write a trained adapter on its own, or merged into its base model, checked against base and adapter.

    Whatever goes wrong, --output is left as it was.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wants one of {', '.join(_DTYPES)}")
    quiet_libraries()
    want_supported("peft")
    from ..integrations.export import TOLERANCES, export_adapter  # loads transformers: not for --help

    chosen = getattr(torch, dtype)
    with interruptible(), RunDisplay() as display:
        done = export_adapter(
            adapter, output, model=model, merged=merged, dtype=chosen, overwrite=overwrite, stage=display.stage
        )
    if json_output:
        facts = {"folder": str(done.folder), "bytes": done.size, "logit_difference": done.difference}
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{done.folder}: {_size(done.size)}")
    if done.difference is None:
        typer.echo("a copy of the adapter, which fits the base model and loads")
        typer.echo(f"load it with: PeftModel.from_pretrained(base, {str(done.folder)!r})")
        return
    at_most = f"at most {TOLERANCES[chosen]:.0e} is right in {dtype}"
    typer.echo(
        f"logits of the merged model and of base and adapter differ by {done.difference:.1e} of the largest; {at_most}"
    )
    typer.echo(f"load it with: AutoModelForCausalLM.from_pretrained({str(done.folder)!r}, dtype={dtype!r})")


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
