"""The training loop: one optimizer step after the other, resumable, as a generator of what happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..batches import PromptLengthSampler
from ..errors import CheckpointError, NonFiniteLoss
from ..losses import echo_distillation
from ..method.model import EchoLoRA
from ..ops.echo_distillation import IGNORE_INDEX
from .checkpoint import latest_checkpoint, read_checkpoint, restore, save_checkpoint
from .data import Sample, collate
from .processes import Processes
from .settings import TrainSettings


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    Args:
        step: counted from 1. loss, loss_off, loss_on, loss_kd: nats a supervised token; None where not computed.
        routed: whether the ON branch ran. echo_probability: p_k, or 0 for plain methods.
        learning_rate, grad_norm: before clipping. tokens: real tokens of the step. seconds: of the step.
        Of all processes together, but `seconds`.
        skipped_samples: samples without a supervised token.
    """

    step: int
    loss: float
    loss_off: float
    loss_on: float | None
    loss_kd: float | None
    routed: bool
    echo_probability: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped_samples: int


class Trainer:
    """Runs `settings.steps` optimizer steps, from the last checkpoint in `folder` if there is one.

    Args:
        model: an `EchoLoRA` for the echo methods, else the model with adapters.
        samples: training samples. pad_token_id: for the batches.
        folder: of the checkpoints. save_every: steps between them; the last step always saves.
        keep: how many checkpoints stay.
        extra_state: JSON values stored with every checkpoint.
        processes: those that share each step's samples; the first one alone reads and writes checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: list[Sample],
        pad_token_id: int,
        settings: TrainSettings,
        folder: Path,
        *,
        save_every: int = 25,
        keep: int = 2,
        extra_state: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.samples, self.pad_token_id = model, samples, pad_token_id
        self.settings, self.folder, self.save_every, self.keep = settings, folder, save_every, keep
        self.extra_state, self.processes = extra_state or {}, processes or Processes()
        per_step = settings.batch_size * settings.accumulate
        lengths = [sample.prompt_length for sample in samples]
        self.sampler = PromptLengthSampler(lengths, per_step, seed=settings.seed)
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.parameters], lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.history: list[StepRecord] = []
        self.processes.copy_first(p for _, p in self.parameters)
        saved = self.processes.from_first(self._read_last)
        if saved is not None:
            weights, moments, self.history = saved
            restore(self.parameters, self.optimizer, weights, moments)
            if isinstance(model, EchoLoRA):
                model.step = self.step
        self._saved = self.step
        self._consistent = True  # parameters, optimizer and history are those of the last complete step

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.history)

    def steps(self) -> Iterator[StepRecord]:
        """Take the remaining steps one by one.

        Raises:
            NonFiniteLoss: the loss or the gradient is NaN or infinite, and the parameters were not updated with it;
                or a parameter to be saved is. The last checkpoint stays.
        """
        self.model.train()
        while self.step < self.settings.steps:
            record = self._take_step(self.step)
            self.history.append(record)
            self._consistent = True
            if self.step % self.save_every == 0 or self.step == self.settings.steps:
                self._save()
            yield record

    def save_interrupted(self) -> None:
        """After an interrupt: a checkpoint of the last complete step, unless it has one or the next is half done."""
        if self._consistent and self.step > self._saved:
            self._save()

    def _read_last(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[StepRecord]] | None:
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return None
        weights, moments, state = read_checkpoint(checkpoint, self.parameters)
        return weights, moments, _history(checkpoint, state["history"])

    def _take_step(self, step: int) -> StepRecord:
        settings, started = self.settings, time.perf_counter()
        learning_rate = settings.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        processes = self.processes
        processes.seed(settings.seed, step)
        chosen = processes.share([self.samples[index] for index in self.sampler.step(step)])
        device = self.parameters[0][1].device
        batches = [
            {
                key: value.to(device)
                for key, value in collate(chosen[start : start + settings.batch_size], self.pad_token_id).items()
            }
            for start in range(0, len(chosen), settings.batch_size)
        ]
        items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        num_items = int(processes.sums([items])[0])
        sums = dict.fromkeys(("loss", "loss_off", "loss_on", "loss_kd", "skipped_samples", "tokens"), 0.0)
        for batch in batches:
            output = self._run(batch, num_items)
            for name in ("loss", "loss_off", "loss_on", "loss_kd"):
                sums[name] += 0.0 if output[name] is None else output[name].item()
            sums["skipped_samples"] += output["skipped_samples"]
            sums["tokens"] += int(batch["attention_mask"].sum())
            output["loss"].backward()
        sums = dict(zip(sums, processes.sums(sums.values()), strict=True))
        self._check_finite(step, "loss", sums["loss"])
        processes.sum_gradients([p for _, p in self.parameters])
        grad_norm = float(nn.utils.clip_grad_norm_([p for _, p in self.parameters], settings.max_grad_norm))
        self._check_finite(step, "gradient norm", grad_norm)
        routing = (self.model.routed, self.model.echo_probability) if isinstance(self.model, EchoLoRA) else (False, 0.0)
        self._consistent = False  # until the record of this step is in the history
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.model, EchoLoRA):
            self.model.advance()
        return StepRecord(
            step=step + 1,
            loss=sums["loss"],
            loss_off=sums["loss_off"],
            loss_on=sums["loss_on"] if routing[0] else None,
            loss_kd=sums["loss_kd"] if routing[0] else None,
            routed=routing[0],
            echo_probability=routing[1],
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=int(sums["tokens"]),
            seconds=time.perf_counter() - started,
            skipped_samples=int(sums["skipped_samples"]),
        )

    def _run(self, batch: dict[str, torch.Tensor], num_items: int) -> dict[str, Any]:
        low = self.settings.dtype != "float32"
        autocast = torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16) if low else nullcontext()
        with autocast:
            if isinstance(self.model, EchoLoRA):
                return self.model(**batch, num_items_in_batch=num_items)
            labels = batch["labels"]
            logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            losses = echo_distillation(logits, None, labels, num_items=num_items)
            return {**losses._asdict(), "skipped_samples": int((labels == IGNORE_INDEX).all(dim=1).sum())}

    def _check_finite(self, step: int, what: str, value: float) -> None:
        if value - value != 0.0:  # NaN and infinity alone
            raise self._not_finite(step + 1, what, value)

    def _not_finite(self, step: int, what: str, value: object) -> NonFiniteLoss:
        checkpoint = latest_checkpoint(self.folder)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        return NonFiniteLoss(f"the {what} became {value} at step {step}; {kept}")

    def _save(self) -> None:
        for name, parameter in self.parameters:  # an update with finite gradients can still overflow
            if not parameter.isfinite().all():
                raise self._not_finite(self.step, f"parameter {name}", "not finite")
        if self.processes.first:
            state = {
                "settings": self.settings.to_dict(),
                "history": [dataclasses.asdict(record) for record in self.history],
                **self.extra_state,
            }
            save_checkpoint(self.folder, self.step, self.parameters, self.optimizer, state, self.keep)
        self._saved = self.step


def _history(checkpoint: Path, records: Any) -> list[StepRecord]:
    try:
        return [StepRecord(**record) for record in records]
    except TypeError as error:
        raise CheckpointError(f"{checkpoint / 'state.json'}: damaged history ({error})") from error
