"""Exact-match accuracy of generated answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .data import Question, Sample, sample_of

_ANSWER_IS = re.compile(r".*\banswer is:?\s+", re.DOTALL | re.IGNORECASE)


def normalise_answer(text: str) -> str:
    """The answer in `text`: what follows "answer is" if that occurs, without case, outer space and final stops."""
    return _ANSWER_IS.sub("", text).strip().rstrip(".!").strip().casefold()


def room_for(samples: Iterable[Sample]) -> int:
    """Tokens to generate at most: as many as the longest target has, and two more."""
    return max(len(sample.input_ids) - sample.prompt_length for sample in samples) + 1  # with its end-of-text


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    *,
    batch_size: int = 20,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[float, list[str]]:
    """Share of questions whose greedily generated answer is exactly right, and the generated texts.

    Args:
        model: a causal LM with `generate`; put into eval mode for the while.
        questions: what to ask.
        batch_size: questions at a time. max_new_tokens: None gives room for the longest target and two tokens more.
        on_batch: told after each batch how many questions are done.

    Returns:
        accuracy in [0, 1], and one text per question.
    """
    samples = [sample_of(tokenizer, question) for question in questions]
    if max_new_tokens is None:
        max_new_tokens = room_for(samples)
    was_training, texts = model.training, [""] * len(questions)
    model.eval()
    prompts = [sample.input_ids[: sample.prompt_length] for sample in samples]
    by_length = sorted(range(len(questions)), key=lambda index: len(prompts[index]))  # wastes little padding
    for start in range(0, len(questions), batch_size):
        chosen = by_length[start : start + batch_size]
        input_ids, attention_mask = _pad_left([prompts[index] for index in chosen], tokenizer.pad_token_id)
        generated = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, tokens in zip(chosen, generated[:, input_ids.shape[1] :], strict=True):
            texts[index] = tokenizer.decode(tokens, skip_special_tokens=True)
        on_batch(min(start + batch_size, len(questions)))
    model.train(was_training)
    right = [
        normalise_answer(text) == normalise_answer(question.answer)
        for text, question in zip(texts, questions, strict=True)
    ]
    return sum(right) / len(right), texts


def _pad_left(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids, attention_mask
