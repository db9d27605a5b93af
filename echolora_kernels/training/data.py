"""Questions and answers: from reasoning-gym or LLM-Adapters files to padded batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..ops.echo_distillation import IGNORE_INDEX

_HELD_OUT = 1_000_003  # keeps the held-out questions' seed apart from the training questions'


@dataclass(frozen=True)
class Question:
    """One task: what is asked, the text to learn, and the short answer that counts as right."""

    prompt: str
    target: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A tokenised question: input_ids = prompt + target + end-of-text; the prompt is not supervised."""

    input_ids: list[int]
    prompt_length: int


def load_questions(
    data: str, eval_data: str | None, *, train_size: int, eval_size: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, disjoint.

    Args:
        data, eval_data: reasoning-gym task name or path; eval_data None holds `eval_size` questions of `data` out.
        train_size: how many to draw from a task (files are read whole). eval_size: how many to hold out.

    Raises:
        DataError: an unreadable or malformed file, an unknown task, or too few questions.
    """
    if eval_data is not None:
        train = _load(data, train_size, seed)
        held_out = _load(eval_data, eval_size, seed + _HELD_OUT)
    elif _is_path(data):
        everything = read_llm_adapters(data)
        random.Random(seed).shuffle(everything)
        held_out, train = everything[:eval_size], everything[eval_size:]
    else:
        train, held_out = _load(data, train_size, seed), _load(data, eval_size, seed + _HELD_OUT)
    seen = {question.prompt for question in held_out}
    train = [question for question in train if question.prompt not in seen]
    if not train or not held_out:
        raise DataError(f"{data}: {len(train)} training and {len(held_out)} held-out questions, wants some of both")
    return train, held_out[:eval_size]


def _load(data: str, size: int, seed: int) -> list[Question]:
    return read_llm_adapters(data) if _is_path(data) else generate_questions(data, size, seed)


def _is_path(data: str) -> bool:
    return data.endswith((".json", ".jsonl")) or "/" in data or Path(data).exists()


def generate_questions(task: str, size: int, seed: int) -> list[Question]:
    """`size` questions of a reasoning-gym task; the same ones for the same seed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError(
            f"data: got task {task!r}, which needs the package reasoning-gym (pip install 'echolora-kernels[demo]'); "
            "or give a .json or .jsonl file"
        ) from error
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed)
    except ValueError as error:
        raise DataError(f"data: got {task!r}, which is no .json or .jsonl file and no reasoning-gym task") from error
    entries = [dataset[index] for index in range(size)]
    return [Question(entry["question"], str(entry["answer"]), str(entry["answer"])) for entry in entries]


def read_llm_adapters(path: str | Path) -> list[Question]:
    """The questions of a JSON array or JSONL file with `instruction`, `input`, `output`, `answer`.

    Raises:
        DataError: file, line and reason.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    entries = _json_lines(path, text) if path.suffix == ".jsonl" else _json_array(path, text)
    questions = [_question(path, line, entry) for line, entry in entries]
    if not questions:
        raise DataError(f"{path}: holds no entry")
    return questions


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from error


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Entries with the line each begins on, which json.loads would not tell."""
    decoder, position, line = json.JSONDecoder(), _skip(text, 0, ""), 1
    if text[position : position + 1] != "[":
        raise DataError(f"{path}, line 1: wants a JSON array of entries (or give the file the ending .jsonl)")
    start = 0
    position = _skip(text, position + 1, "")
    while text[position : position + 1] != "]":
        line, start = line + text.count("\n", start, position), position
        try:
            entry, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        yield line, entry
        position = _skip(text, position, "")
        if text[position : position + 1] not in {",", "]"}:
            line += text.count("\n", start, position)
            raise DataError(f"{path}, line {line}: wants ',' or ']' after an entry")
        position = _skip(text, position, ",")


def _skip(text: str, position: int, also: str) -> int:
    while position < len(text) and (text[position].isspace() or text[position] in also):
        position += 1
    return position


def _question(path: Path, line: int, entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {line}: got {type(entry).__name__}, wants an object")
    for name, required in (("instruction", True), ("output", True), ("input", False), ("answer", False)):
        value = entry.get(name, None if required else "")
        if not isinstance(value, str) or (required and not value.strip()):
            raise DataError(f"{path}, line {line}: field {name!r} is {value!r}, wants text")
    prompt = "\n\n".join(part for part in (entry["instruction"], entry.get("input", "")) if part.strip())
    return Question(prompt, entry["output"].strip(), entry.get("answer", "").strip() or entry["output"].strip())


def prompt_text(tokenizer: Any, question: Question) -> str:
    """What the model reads before it answers: the chat template where there is one, else a plain form."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question.prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{tokenizer.bos_token or ''}Question: {question.prompt}\n\nAnswer: "


def encode(tokenizer: Any, questions: list[Question], max_length: int) -> tuple[list[Sample], int]:
    """Samples, and how many questions were left out because they are longer than `max_length` tokens."""
    samples, too_long = [], 0
    for question in questions:
        prompt = tokenizer(prompt_text(tokenizer, question), add_special_tokens=False)["input_ids"]
        target = tokenizer(question.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(target) > max_length:
            too_long += 1
        else:
            samples.append(Sample(prompt + target, len(prompt)))
    if not samples:
        raise DataError(f"data: all {too_long} questions are longer than max_length {max_length} tokens")
    return samples, too_long


def collate(samples: list[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: [N, T], int64, padded on the right, supervised on the target alone."""
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        stop = len(sample.input_ids)
        input_ids[row, :stop] = torch.tensor(sample.input_ids)
        attention_mask[row, :stop] = 1
        labels[row, sample.prompt_length : stop] = input_ids[row, sample.prompt_length : stop]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def step_samples(samples: list[Sample], step: int, per_step: int, seed: int) -> list[Sample]:
    """The samples of one optimizer step: a pure function, so that a resumed run sees what the unbroken one saw."""
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, index = divmod(position, len(samples))
        chosen.append(samples[_order(len(samples), seed, epoch)[index]])
    return chosen


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
