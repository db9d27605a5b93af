"""Questions and answers: from reasoning-gym or LLM-Adapters files to padded batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batches import EchoDataCollator
from ..errors import DataError

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
        if eval_size >= len(everything):
            raise DataError(f"eval_size: got {eval_size}, wants less than the {len(everything)} entries of {data}")
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
            f"data: got task {task!r}, which needs the package reasoning-gym (pip install reasoning-gym); "
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
        text = path.read_bytes().decode("utf-8-sig")  # keeps \r, which read_text would turn into a new line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    entries = _json_lines(path, text) if path.suffix == ".jsonl" else _json_array(path, text)
    questions = [_question(path, line, entry) for line, entry in entries]
    if not questions:
        raise DataError(f"{path}: holds no entry")
    return questions


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # splitlines() would also split at U+2028 and its like, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from error


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Entries with the line each begins on, which json.loads would not tell."""
    decoder, position = json.JSONDecoder(), _skip(text, 0)
    if text[position : position + 1] != "[":
        raise _wanted(path, text, position, "a JSON array of entries (or give the file the ending .jsonl)")
    line, start = 1, 0
    position = _skip(text, position + 1)
    more = text[position : position + 1] != "]"
    while more:
        line, start = line + text.count("\n", start, position), position
        try:
            entry, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:  # a second comma or a bracket after one ends here too
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        yield line, entry
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
    if text[position : position + 1] != "]":
        raise _wanted(path, text, position, "',' or ']' after an entry")
    position = _skip(text, position + 1)
    if position < len(text):
        raise _wanted(path, text, position, "nothing after the array")


def _skip(text: str, position: int) -> int:
    """The next position that holds no JSON white space."""
    while text[position : position + 1] in {" ", "\t", "\r", "\n"}:
        position += 1
    return position


def _wanted(path: Path, text: str, position: int, wants: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    return DataError(f"{path}, line {line}: got {text[position : position + 20]!r}, wants {wants}")


def _question(path: Path, line: int, entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {line}: got {type(entry).__name__}, wants an object")
    instruction, output = (_field(path, line, entry, name, required=True) for name in ("instruction", "output"))
    extra, answer = (_field(path, line, entry, name, required=False) for name in ("input", "answer"))
    prompt = "\n\n".join(part for part in (instruction, extra) if part.strip())
    return Question(prompt, output.strip(), answer.strip() or output.strip())


def _field(path: Path, line: int, entry: dict[str, Any], name: str, *, required: bool) -> str:
    value = entry.get(name)
    if value is None and not required:
        return ""
    if name in {"output", "answer"} and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or (required and not value.strip()):
        raise DataError(f"{path}, line {line}: field {name!r} is {value!r}, wants text")
    return value


def prompt_text(tokenizer: Any, question: Question) -> str:
    """What the model reads before it answers: the chat template where there is one, else a plain form."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question.prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{tokenizer.bos_token or ''}Question: {question.prompt}\n\nAnswer:"


def sample_of(tokenizer: Any, question: Question) -> Sample:
    """The question tokenised as one text, for a tokenizer may put a space of its own before a target alone."""
    prompt = prompt_text(tokenizer, question)
    space = "" if tokenizer.chat_template else " "
    prompt_ids, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + space + question.target)
    )
    if whole[: len(prompt_ids)] != prompt_ids:  # the end of the prompt has merged with the target
        whole = prompt_ids + tokenizer(question.target, add_special_tokens=False)["input_ids"]
    return Sample([*whole, tokenizer.eos_token_id], len(prompt_ids))


def encode(tokenizer: Any, questions: list[Question], max_length: int) -> tuple[list[Sample], int]:
    """Samples, and how many questions were left out because they are longer than `max_length` tokens."""
    samples = [sample_of(tokenizer, question) for question in questions]
    fitting = [sample for sample in samples if len(sample.input_ids) <= max_length]
    too_long = len(samples) - len(fitting)
    if not fitting:
        raise DataError(f"data: all {too_long} questions are longer than max_length {max_length} tokens")
    return fitting, too_long


def collate(samples: list[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: [N, T], int64, padded on the right, supervised on the target alone."""
    return EchoDataCollator(pad_token_id)([vars(sample) for sample in samples])
