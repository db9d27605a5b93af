"""`TrainSettings`: everything that decides what a training run computes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..method.config import EchoConfig

METHODS = ("lora", "dora", "echo-lora", "echo-dora")
DTYPES = ("float32", "bfloat16")
QUANTISATIONS = ("nf4", "int8")
ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def want(holds: Callable[[Any], object], wants: str, **values: Any) -> None:
    """Refuse, by its name, the first of `values` for which `holds` is false."""
    for name, value in values.items():
        if not holds(value):
            raise ValueError(f"{name}: got {value!r}, wants {wants}")


def want_counts(**values: int | None) -> None:
    """Refuse what is less than 1; None stands for a default."""
    want(lambda value: value is None or value >= 1, "at least 1", **values)


@dataclass(frozen=True)
class TrainSettings:
    """A training run. Two runs with equal settings on one machine end with equal weights.

    Args:
        model: local folder, .gguf file, "package:NAME" or hub name.
        data: reasoning-gym task name, or a JSON/JSONL file in the LLM-Adapters format.
        eval_data: the same, for held-out questions; None holds some of `data` out.
        method: "lora", "dora", "echo-lora" or "echo-dora".
        rank, alpha, dropout, rslora: of the adapter.
        target_modules: last name parts of the linears that get an adapter (default: those of LLM-Adapters);
            ("all-linear",) takes every linear but the output head.
        steps: optimizer steps, each of batch_size * accumulate samples, which all processes share.
        batch_size: samples a micro-batch, at most. accumulate: micro-batches a step of one process alone.
        lr: peak learning rate; it rises over `warmup` of the steps and falls linearly to 0.
        weight_decay, max_grad_norm: of AdamW and of the clipping.
        max_length: tokens; longer samples are left out and counted.
        train_size: questions to draw from a reasoning-gym task. eval_size: held-out questions.
        seed: of data, initial values, dropout and routing.
        fuse: whether the adapters' linears run through our operators while training, or through PEFT's.
        dtype: "float32", or "bfloat16" for the frozen weights and autocast (adapters stay float32).
        quantize: "nf4" or "int8", as which bitsandbytes stores the frozen linears but the output head; None for `dtype`.
        device: "cpu", "cuda", "cuda:N" or "auto".
        echo: choices of the method; `total_steps` and `seed` are taken from this run.
    """

    model: str
    data: str
    eval_data: str | None = None
    method: str = "echo-lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    train_size: int = 2000
    eval_size: int = 100
    seed: int = 0
    fuse: bool = True
    dtype: str = "float32"
    quantize: str | None = None
    device: str = "auto"
    echo: EchoConfig = field(default_factory=EchoConfig)

    def __post_init__(self) -> None:
        want(lambda value: value in METHODS, f"one of {', '.join(METHODS)}", method=self.method)
        want(lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}", dtype=self.dtype)
        quantisations = f"one of {', '.join(QUANTISATIONS)}, or None"
        want(lambda value: value in (None, *QUANTISATIONS), quantisations, quantize=self.quantize)
        want(re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch, "cpu, cuda, cuda:N or auto", device=self.device)
        want_counts(
            rank=self.rank,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            max_length=self.max_length,
            train_size=self.train_size,
            eval_size=self.eval_size,
        )
        want(
            lambda value: 0 < value < math.inf,
            "a finite number above 0",
            lr=self.lr,
            alpha=self.alpha,
            max_grad_norm=self.max_grad_norm,
        )
        want(lambda value: 0 <= value < math.inf, "a finite number of at least 0", weight_decay=self.weight_decay)
        want(lambda value: 0 <= value < 1, "at least 0 and less than 1", dropout=self.dropout, warmup=self.warmup)
        want(lambda value: value >= 0, "at least 0", seed=self.seed)
        echo = dataclasses.replace(self.echo, total_steps=self.steps, seed=self.seed)
        object.__setattr__(self, "echo", echo)

    @property
    def uses_echo(self) -> bool:
        return self.method.startswith("echo-")

    @property
    def uses_dora(self) -> bool:
        return self.method.endswith("dora")

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        warmup = max(int(self.warmup * self.steps), 1)
        return self.lr * min((step + 1) / warmup, (self.steps - step) / max(self.steps - warmup, 1), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in dataclasses.fields(self)
        }
        return {**values, "echo": self.echo.to_dict()}
