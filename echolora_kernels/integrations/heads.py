"""The output head of a model, replaced for a pass: logits of chosen rows alone, or a loss in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .caches import inner_model


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, None where that is not known."""
    get_output_embeddings: Any = getattr(inner_model(model), "get_output_embeddings", None)
    return None if get_output_embeddings is None else get_output_embeddings()


@contextmanager
def head_computing(head: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, ``head(hidden)`` is ``function(hidden)``; whatever hooks the head has still run."""
    before = vars(head).get("forward")
    head.forward = function
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def without_logits(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model's logits are nothing to look at, and cost nothing where its head is known."""
    head = output_head(model)
    return nullcontext() if head is None else head_computing(head, lambda hidden: hidden[..., :1])


def is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is ``hidden @ weight^T + bias`` of plain tensors that are not trained."""
    own = type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    return own and not any(parameter.requires_grad for parameter in head.parameters())


def gives_logits(model: nn.Module, head: nn.Module) -> bool:
    """Whether what the head returns are the model's logits, with no cap or scale after it.

    Tried with one token, without a graph or a change to torch's random generators.
    """
    given: list[torch.Tensor] = []

    def one_column(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden[..., :1])
        return given[-1]

    device = inner_model(model).device
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), generators, head_computing(head, one_column):
        output = model(input_ids=token, use_cache=False)
    return len(given) == 1 and output.logits is given[0]
