"""`echolora train`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Option

from ..integrations.versions import want_supported
from ..method.config import EchoConfig
from ..training.checkpoint import latest_checkpoint
from ..training.processes import launched
from ..training.settings import DEFAULT_TARGETS, TrainSettings, want_counts
from .show import RunDisplay, print_summary, quiet_libraries

_METHOD, _ADAPTER, _OPTIMISER, _DATA, _ECHO, _RUN = (
    "What to train", "Adapter", "Optimiser", "Data", "Echo", "Run"
)  # fmt: skip
_DEFAULT: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
_ECHO_DEFAULT: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(EchoConfig)}


def train(
    model: Annotated[str, Option(help="Local folder, .gguf file, package:NAME or hub name.", rich_help_panel=_METHOD)],
    data: Annotated[str, Option(help="reasoning-gym task, or .json/.jsonl file with instruction, input, output, answer.", rich_help_panel=_METHOD)],
    output: Annotated[Path, Option(help="Folder for adapter, metrics.json, loss.png and checkpoints.", rich_help_panel=_METHOD)],
    method: Annotated[str, Option(help="lora, dora, echo-lora or echo-dora.", rich_help_panel=_METHOD)] = _DEFAULT["method"],
    rank: Annotated[int, Option(help="Rank r.", rich_help_panel=_ADAPTER)] = _DEFAULT["rank"],
    alpha: Annotated[int, Option(help="Scaling is alpha / r.", rich_help_panel=_ADAPTER)] = _DEFAULT["alpha"],
    dropout: Annotated[float, Option(help="Dropout before A.", rich_help_panel=_ADAPTER)] = _DEFAULT["dropout"],
    rslora: Annotated[bool, Option("--rslora", help="Scaling alpha / sqrt(r).", rich_help_panel=_ADAPTER)] = False,
    target_modules: Annotated[str, Option(help="Comma-separated linears that get an adapter, or all-linear: all but the output head.", rich_help_panel=_ADAPTER)] = ",".join(DEFAULT_TARGETS),
    steps: Annotated[int, Option(help="Optimizer steps.", rich_help_panel=_OPTIMISER)] = _DEFAULT["steps"],
    batch_size: Annotated[int, Option(help="Samples a micro-batch.", rich_help_panel=_OPTIMISER)] = _DEFAULT["batch_size"],
    accumulate: Annotated[int, Option(help="Micro-batches a step.", rich_help_panel=_OPTIMISER)] = _DEFAULT["accumulate"],
    lr: Annotated[float, Option(help="Peak learning rate.", rich_help_panel=_OPTIMISER)] = _DEFAULT["lr"],
    warmup: Annotated[float, Option(help="Share of the steps that warm up.", rich_help_panel=_OPTIMISER)] = _DEFAULT["warmup"],
    weight_decay: Annotated[float, Option(help="Of AdamW.", rich_help_panel=_OPTIMISER)] = _DEFAULT["weight_decay"],
    max_grad_norm: Annotated[float, Option(help="Gradient clipping.", rich_help_panel=_OPTIMISER)] = _DEFAULT["max_grad_norm"],
    eval_data: Annotated[str | None, Option(help="Held-out questions; by default some of --data.", rich_help_panel=_DATA)] = None,
    train_size: Annotated[int, Option(help="Questions to draw from a task.", rich_help_panel=_DATA)] = _DEFAULT["train_size"],
    eval_size: Annotated[int, Option(help="Held-out questions.", rich_help_panel=_DATA)] = _DEFAULT["eval_size"],
    eval_batch_size: Annotated[int, Option(help="Questions generated at a time.", rich_help_panel=_DATA)] = 20,
    max_new_tokens: Annotated[int | None, Option(help="Of a generated answer; by default the longest target + 2.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(help="Tokens; longer samples are left out and counted.", rich_help_panel=_DATA)] = _DEFAULT["max_length"],
    source_layers: Annotated[str | None, Option(help="Comma-separated blocks the echo is read from; by default by depth.", rich_help_panel=_ECHO)] = None,
    target_layers: Annotated[str | None, Option(help="Comma-separated blocks the echo goes into; by default by depth.", rich_help_panel=_ECHO)] = None,
    echo_target_modules: Annotated[str | None, Option(help="Comma-separated linears the echo goes into; by default all with an adapter.", rich_help_panel=_ECHO)] = None,
    source_pooling: Annotated[str, Option(help="mean of the source blocks, or last.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["source_pooling"],
    no_detach_source: Annotated[bool, Option("--no-detach-source", help="Let gradient flow into the source states.", rich_help_panel=_ECHO)] = False,
    norm_eps: Annotated[float, Option(help="Of the norm on the source state.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["norm_eps"],
    echo_site: Annotated[str, Option(help="output, adapter_input or rank.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["site"],
    bottleneck: Annotated[int, Option(help="Inner width of the echo networks.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["bottleneck"],
    gate_bias: Annotated[float, Option(help="Initial bias of the gates.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["gate_bias"],
    echo_scale: Annotated[float, Option(help="Initial scale of the echo.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["scale"],
    dora_echo: Annotated[str, Option(help="outside or inside the DoRA magnitude.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["dora_echo"],
    no_answer_mask: Annotated[bool, Option("--no-answer-mask", help="Inject at every position, not only the answer's.", rich_help_panel=_ECHO)] = False,
    echo_start_probability: Annotated[float, Option(help="Of routing, at the first step.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["echo_start_probability"],
    echo_end_probability: Annotated[float, Option(help="Of routing, reached after the last step.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["echo_end_probability"],
    kd_weight: Annotated[float, Option(help="Weight of the distillation.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["kd_weight"],
    kd_temperature: Annotated[float, Option(help="Temperature of the distillation.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["kd_temperature"],
    kd_detach: Annotated[str, Option(help="on, none or off: the side of the KL without gradient.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["kd_detach"],
    step_mode: Annotated[str, Option(help="auto, shared, packed or two-pass.", rich_help_panel=_ECHO)] = _ECHO_DEFAULT["step_mode"],
    seed: Annotated[int, Option(help="Of data, initial values, dropout and routing.", rich_help_panel=_RUN)] = _DEFAULT["seed"],
    fuse: Annotated[bool, Option("--fuse/--no-fuse", help="Train the adapters through our operators, or through PEFT's own.", rich_help_panel=_RUN)] = _DEFAULT["fuse"],
    dtype: Annotated[str, Option(help="float32 or bfloat16.", rich_help_panel=_RUN)] = _DEFAULT["dtype"],
    quantize: Annotated[str | None, Option(help="nf4 or int8: how bitsandbytes stores the frozen linears; by default as --dtype says.", rich_help_panel=_RUN)] = None,
    device: Annotated[str, Option(help="cpu, cuda, cuda:N or auto.", rich_help_panel=_RUN)] = _DEFAULT["device"],
    threads: Annotated[int | None, Option(help="CPU threads; by default torch's choice.", rich_help_panel=_RUN)] = None,
    save_every: Annotated[int, Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = 25,
    keep: Annotated[int, Option(help="Checkpoints that stay.", rich_help_panel=_RUN)] = 2,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint in --output.", rich_help_panel=_RUN)] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Discard an earlier run in --output once the new one is ready to train.", rich_help_panel=_RUN)] = False,
    json_output: Annotated[bool, Option("--json", help="Print metrics.json without the history instead of a table.", rich_help_panel=_RUN)] = False,
) -> None:  # fmt: skip
    """Fine-tune a causal language model and write an ordinary PEFT adapter.

    Wants --model, --data and --output; everything else has a default. Interrupted, the same command with --resume goes on.
    """
    settings = TrainSettings(
        model=model,
        data=data,
        eval_data=eval_data,
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        target_modules=tuple(_names("target_modules", target_modules)),
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        max_length=max_length,
        train_size=train_size,
        eval_size=eval_size,
        seed=seed,
        fuse=fuse,
        dtype=dtype,
        quantize=quantize,
        device=device,
        echo=EchoConfig(
            source_layers=_numbers("source_layers", source_layers),
            target_layers=_numbers("target_layers", target_layers),
            target_modules=None
            if echo_target_modules is None
            else tuple(_names("echo_target_modules", echo_target_modules)),
            source_pooling=source_pooling,
            detach_source=not no_detach_source,
            norm_eps=norm_eps,
            bottleneck=bottleneck,
            gate_bias=gate_bias,
            scale=echo_scale,
            site=echo_site,
            dora_echo=dora_echo,
            answer_mask=not no_answer_mask,
            echo_start_probability=echo_start_probability,
            echo_end_probability=echo_end_probability,
            kd_weight=kd_weight,
            kd_temperature=kd_temperature,
            kd_detach=kd_detach,
            step_mode=step_mode,
        ),
    )
    want_counts(threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()
    want_supported("peft")
    from ..training.run import CHECKPOINTS
    from ..training.run import train as run  # loads transformers: not for --help

    try:
        with RunDisplay() as display:
            metrics = run(
                settings,
                output,
                display,
                resume=resume,
                overwrite=overwrite,
                save_every=save_every,
                keep=keep,
                eval_batch_size=eval_batch_size,
                max_new_tokens=max_new_tokens,
            )
    except KeyboardInterrupt:
        if launched()[0] == 0:
            typer.echo(f"interrupted; {_way_on(output / CHECKPOINTS, overwrite)}", err=True)
        raise typer.Exit(130) from None
    if launched()[0] > 0:  # the first process shows the results
        return
    if json_output:
        typer.echo(json.dumps({key: value for key, value in metrics.items() if key != "history"}, indent=2))
    else:
        print_summary(metrics, output)


def _way_on(checkpoints: Path, overwrite: bool) -> str:
    checkpoint = latest_checkpoint(checkpoints)
    if checkpoint is None:
        return "there is no checkpoint yet, so the same command starts over"
    return f"the same command with --resume{' instead of --overwrite' if overwrite else ''} goes on from {checkpoint}"


def _names(name: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"{name}: got {text!r}, wants names separated by commas")
    return names


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in _names(name, text))
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, wants block numbers separated by commas") from None
