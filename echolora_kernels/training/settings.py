"""`TrainSettings`: everything that decides what a training run computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..method.config import EchoConfig

METHODS = ("lora", "dora", "echo-lora", "echo-dora")
DTYPES = ("float32", "bfloat16")
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainSettings:
    """A training run. Two runs with equal settings on one machine end with equal weights.

    Args:
        model: local folder, .gguf file, "package:NAME" or hub name.
        data: reasoning-gym task name, or a JSON/JSONL file in the LLM-Adapters format.
        eval_data: the same, for held-out questions; None holds some of `data` out.
        method: "lora", "dora", "echo-lora" or "echo-dora".
        rank, alpha, dropout, rslora: of the adapter.
        target_modules: last name parts of the linears that get an adapter (default: those of LLM-Adapters).
        steps: optimizer steps. batch_size: samples a micro-batch. accumulate: micro-batches a step.
        lr: peak learning rate; it rises over `warmup` of the steps and falls linearly to 0.
        weight_decay, max_grad_norm: of AdamW and of the clipping.
        max_length: tokens; longer samples are left out and counted.
        train_size: questions to draw from a reasoning-gym task. eval_size: held-out questions.
        seed: of data, initial values, dropout and routing.
        dtype: "float32", or "bfloat16" for the frozen weights and autocast (adapters stay float32).
        device: "cpu", "cuda" or "auto".
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
    dtype: str = "float32"
    device: str = "auto"
    echo: EchoConfig = field(default_factory=EchoConfig)

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wants one of {', '.join(choices)}")
        for name in ("rank", "steps", "batch_size", "accumulate", "max_length", "train_size", "eval_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wants at least 1")
        for name in ("lr", "alpha", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wants more than 0")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wants 0 <= {name} < 1")
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
