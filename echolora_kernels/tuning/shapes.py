"""The linears of a model that adapters go on, as [d_out, d_in]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..models import MODELS

Shape = tuple[int, int]

KNOWN = tuple(MODELS)


def known(name: str) -> list[Shape]:
    """The shapes in a model that is known by name.

    Raises:
        ValueError: it is not; the message lists those that are.
    """
    if name not in MODELS:
        raise ValueError(f"shapes: got {name!r}, wants {', '.join(KNOWN)}; --model takes any other")
    parts = MODELS[name].parts().values()
    return distinct((widths[0], d_in) for d_in, widths in parts if len(widths) == 1)


def of_model(name_or_folder: str) -> list[Shape]:
    """The shapes of every linear but the output head in a transformers model, of which only the configuration is read.

    Raises:
        ImportError: transformers is missing.
        OSError: there is no such model here, nor can it be fetched.
        ValueError: it has no linears.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("model: transformers is missing; --shapes goes without it") from error
    config = AutoConfig.from_pretrained(name_or_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    if not linears:
        raise ValueError(f"model: {name_or_folder} has no nn.Linear beside its output head")
    return distinct((linear.out_features, linear.in_features) for linear in linears)


def distinct(shapes: Iterable[Shape]) -> list[Shape]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(shapes))


def tiny(shapes: Sequence[Shape]) -> list[Shape]:
    """About the same proportions with the longest side at 64: for Triton's interpreter."""
    longest = max(side for shape in shapes for side in shape)
    small = lambda side: max(16, round(64 * side / longest / 8) * 8)  # noqa: E731
    return distinct((small(d_out), small(d_in)) for d_out, d_in in shapes)
