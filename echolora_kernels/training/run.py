"""A whole run: load, evaluate, train, evaluate, export, verify, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .. import __version__
from ..errors import CheckpointError
from ..files import write_text
from ..integrations.fuse import fuse, unfuse
from ..integrations.saving import replacing, want_writable
from ..integrations.transformers import load_model
from ..method.model import EchoLoRA
from .checkpoint import latest_checkpoint, read_json, read_state
from .data import Sample, collate, encode, load_questions, sample_of
from .evaluate import exact_match, room_for
from .loop import StepRecord, Trainer
from .processes import Processes, launched
from .settings import ALL_LINEAR, TrainSettings, want, want_counts

ADAPTER, CHECKPOINTS, METRICS, PLOT = "adapter", "checkpoints", "metrics.json", "loss.png"
# without these a finished run cannot be reported again
_REPORTED = (
    "settings", "accuracy_before", "accuracy_after", "held_out_questions", "reload_max_abs_logit_difference",
    "seconds_per_routed_step", "seconds_per_plain_step", "tokens_per_second", "routed_steps", "final_loss_off",
)  # fmt: skip


class Observer(Protocol):
    """Shows a run to somebody."""

    def stage(self, text: str) -> None:
        """A new part of the work has begun."""

    def batches(self, text: str, total: int) -> Any:
        """A context manager that gives a function to call with how many of `total` are done."""

    def training(self, records: Iterator[StepRecord], total: int, done: int) -> Iterable[StepRecord]:
        """Pass the records through, showing them."""


class Unwatched:
    """Shows nothing: the observer of every process but the first."""

    def stage(self, text: str) -> None:
        pass

    @contextmanager
    def batches(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def training(self, records: Iterator[StepRecord], total: int, done: int) -> Iterable[StepRecord]:
        return records


def train(
    settings: TrainSettings,
    output: str | Path,
    observer: Observer,
    *,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 25,
    keep: int = 2,
    eval_batch_size: int = 20,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Fine-tune, and write an ordinary PEFT adapter, metrics.json and loss.png into `output`.

    Started by torchrun or accelerate launch, or in a process group, the processes share every step's samples and the
    evaluation; the first one alone shows, reads and writes. All are to pass the same arguments.

    Args:
        settings: what to compute.
        output: a folder. observer: told about the progress.
        resume: go on from the last checkpoint in `output`, if there is one; a finished run is only reported again.
        overwrite: remove an earlier run in `output`, once the new one is ready to train.
        save_every, keep: of the checkpoints. eval_batch_size, max_new_tokens: of the evaluation.

    Returns:
        The content of metrics.json.

    Raises:
        FileExistsError: `output` holds a run, and neither resume nor overwrite is set.
        CheckpointError: resuming with other settings, or what is to be resumed is damaged; the message lists what.
        NonFiniteLoss, DataError, OSError: as the parts say.
        KeyboardInterrupt: passed on, after a checkpoint of the last complete step where that is possible.
    """
    from .plot import plot_losses  # here: what else stands in this module needs no matplotlib

    output = Path(output)
    want_counts(save_every=save_every, keep=keep, eval_batch_size=eval_batch_size, max_new_tokens=max_new_tokens)
    device = _device(settings.device)
    if device == "cpu" and settings.quantize == "int8" and settings.uses_dora:
        raise ValueError(
            f"quantize: got 'int8' with {settings.method} on a CPU, where PEFT cannot evaluate it; wants nf4, or no DoRA"
        )
    processes = Processes(device)
    observer = observer if processes.first else Unwatched()
    earlier = processes.from_first(lambda: _earlier_run(output, settings, resume, overwrite))
    if earlier is not None and "accuracy_after" in earlier:  # a finished run
        processes.leave()
        return earlier
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)

    observer.stage(f"reading {settings.data}")
    questions, held_out = load_questions(
        settings.data,
        settings.eval_data,
        train_size=settings.train_size,
        eval_size=settings.eval_size,
        seed=settings.seed,
    )
    observer.stage(f"loading {settings.model}")
    base, tokenizer = load_model(settings.model, dtype=dtype, device=device, quantize=settings.quantize)
    samples, too_long = encode(tokenizer, questions, settings.max_length)
    if too_long:
        observer.stage(f"left out {too_long} of {len(questions)} questions longer than {settings.max_length} tokens")

    def accuracy(model: nn.Module, text: str) -> float:
        mine = processes.share(held_out)
        right = 0.0
        with observer.batches(text, len(held_out)) as on_batch:
            if mine:
                part, _ = exact_match(
                    model,
                    tokenizer,
                    mine,
                    batch_size=eval_batch_size,
                    max_new_tokens=max_new_tokens or room_for(sample_of(tokenizer, q) for q in held_out),
                    on_batch=lambda done: on_batch(len(held_out) * done // len(mine)),
                )
                right = part * len(mine)
        return round(processes.sums([right])[0]) / len(held_out)

    before = earlier["accuracy_before"] if earlier else accuracy(base, "accuracy before")
    torch.manual_seed(settings.seed)  # whatever came before, the adapter starts from the same values
    model = with_adapter(base, settings)
    if settings.fuse and (left := fuse(model).skipped):
        name, reason = next(iter(left.items()))
        observer.stage(f"PEFT computes {len(left)} adapters itself, the first of them {name}: {reason}")
    wrapped: nn.Module = EchoLoRA(model, settings.echo) if settings.uses_echo else model
    if processes.first:
        if overwrite:  # not before everything that can be refused has been accepted
            _discard(output)
        output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        wrapped,
        samples,
        tokenizer.pad_token_id,
        settings,
        output / CHECKPOINTS,
        save_every=save_every,
        keep=keep,
        extra_state={"accuracy_before": before},
        processes=processes,
    )
    try:
        for _ in observer.training(trainer.steps(), settings.steps, trainer.step):
            pass
    except KeyboardInterrupt:
        trainer.save_interrupted()  # sends nothing: the other processes may be gone
        raise

    if isinstance(wrapped, EchoLoRA):
        wrapped.remove()
    unfuse(model)  # what is evaluated and compared with the saved adapter is stock PEFT
    after = accuracy(model, "accuracy after")

    def results() -> dict[str, Any]:
        observer.stage("writing the adapter and loading it back with PEFT")
        save_adapter(model, output / ADAPTER)
        difference = reload_difference(model, settings, output / ADAPTER, samples[:4], tokenizer, dtype, device)
        plot_losses(trainer.history, f"{settings.method} on {Path(settings.data).stem}", output / PLOT)
        metrics = _metrics(settings, trainer, before, after, difference, len(held_out), too_long)
        write_json(output / METRICS, metrics)
        return metrics

    metrics = processes.from_first(results)
    processes.leave()
    return metrics


def with_adapter(base: nn.Module, settings: TrainSettings) -> PeftModel:
    """`base` with a fresh PEFT adapter on every target module."""
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    everywhere = settings.target_modules == (ALL_LINEAR,)
    unknown = [name for name in settings.target_modules if name not in names]
    if unknown and not everywhere:
        raise ValueError(f"target_modules: got {unknown}, wants names among the model's linears {sorted(names)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.uses_dora,
        use_rslora=settings.rslora,
        target_modules=ALL_LINEAR if everywhere else list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for adapter_config in model.peft_config.values():
        adapter_config.base_model_name_or_path = settings.model
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter, or after any error leave an earlier one as it was."""
    with replacing(folder) as unfinished:
        model.save_pretrained(str(unfinished), save_embedding_layers=False)  # no embedding is trained


@torch.no_grad()
def reload_difference(
    trained: nn.Module,
    settings: TrainSettings,
    adapter: Path,
    samples: list[Sample],
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
) -> float:
    """Largest logit difference between the trained model and a fresh one with the saved adapter, by PEFT alone."""
    batch = {key: value.to(device) for key, value in collate(samples, tokenizer.pad_token_id).items()}
    base, _ = load_model(settings.model, dtype=dtype, device=device, quantize=settings.quantize)
    fresh = PeftModel.from_pretrained(base, str(adapter)).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return float((trained.eval()(**inputs).logits - fresh(**inputs).logits).abs().max())


def write_json(path: Path, value: Any) -> None:
    """The whole file, or what was there before."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _device(name: str) -> str:
    _, size, local_rank = launched()
    if size > 1:
        want(lambda value: ":" not in value, "cpu, cuda or auto: each process takes a GPU of its own", device=name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size > 1:
        name = f"cuda:{local_rank}"
    if name != "cpu":
        number = int(name.partition(":")[2] or 0)
        here = torch.cuda.device_count()
        want(lambda _: number < here, f"cpu, or one of the {here} CUDA devices here", device=name)
    return name


def _earlier_run(output: Path, settings: TrainSettings, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """What `output` holds and is to be carried on: a finished run's metrics, or the last checkpoint's state."""
    want_writable(output)
    occupied = [name for name in (METRICS, ADAPTER, CHECKPOINTS) if (output / name).exists()]
    if overwrite or not occupied:
        return None
    if not resume:
        raise FileExistsError(
            f"output: {output} already holds a run; give --resume to go on or --overwrite to discard it"
        )
    checkpoint = latest_checkpoint(output / CHECKPOINTS)
    if (output / METRICS).is_file():
        where, state = output / METRICS, read_json(output / METRICS, _REPORTED, "remove it to go on without it")
    elif checkpoint is not None:
        where, state = checkpoint, read_state(checkpoint)
    else:
        return None
    differing = _differences(state["settings"], settings.to_dict())
    if differing:
        raise CheckpointError(f"{where}: belongs to a run with other settings: " + "; ".join(differing))
    return state


def _discard(output: Path) -> None:
    for name in (ADAPTER, CHECKPOINTS):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (METRICS, PLOT):
        (output / name).unlink(missing_ok=True)


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return found


def _metrics(
    settings: TrainSettings,
    trainer: Trainer,
    before: float,
    after: float,
    difference: float,
    held_out: int,
    too_long: int,
) -> dict[str, Any]:
    history = trainer.history
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "held_out_questions": held_out,
        "reload_max_abs_logit_difference": difference,
        "seconds_per_step": statistics.median(record.seconds for record in history),
        "seconds_per_routed_step": _median([record.seconds for record in history if record.routed]),
        "seconds_per_plain_step": _median([record.seconds for record in history if not record.routed]),
        "tokens_per_second": sum(record.tokens for record in history) / sum(record.seconds for record in history),
        "routed_steps": sum(record.routed for record in history),
        "final_loss_off": statistics.fmean(record.loss_off for record in history[-10:]),
        "trainable_parameters": sum(parameter.numel() for _, parameter in trainer.parameters),
        "left_out_too_long": too_long,
        "processes": trainer.processes.size,
        "skipped_samples": sum(record.skipped_samples for record in history),
        "versions": {"echolora_kernels": __version__, "torch": torch.__version__},
        "settings": settings.to_dict(),
        "history": [dataclasses.asdict(record) for record in history],
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
