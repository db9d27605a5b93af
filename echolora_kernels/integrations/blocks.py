"""Finding the decoder blocks of a causal language model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks of `model`.

    The list is the nn.ModuleList with as many entries as the text configuration's `num_hidden_layers`; without such a
    configuration the longest nn.ModuleList.

    Raises:
        ValueError: there is no such list, or more than one; or the model is one of transformers and no causal LM.
    """
    _want_causal(model)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    if depth is None:
        depth = max((len(module) for _, module in lists), default=0)
        wanted = "at least one torch.nn.ModuleList of blocks"
    else:
        wanted = f"exactly one torch.nn.ModuleList of {depth} blocks (config.num_hidden_layers)"
    found = [(name, module) for name, module in lists if len(module) == depth and _inside_no_other(name, lists, depth)]
    if len(found) != 1 or depth < 1:
        names = [name for name, _ in found] or [f"{name} ({len(module)})" for name, module in lists]
        raise ValueError(f"model: got module lists {names}, wants {wanted}")
    return found[0]


def hidden_width(model: nn.Module) -> int:
    """d, the width of block outputs: the configuration's `hidden_size`, else that of the first embedding."""
    width = getattr(_text_config(model), "hidden_size", None)
    if width is not None:
        return width
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise ValueError("model: the width of its blocks is unknown; give it a `config` with `hidden_size`")
    return embedding.embedding_dim


def gather_in_backward(block: nn.Module, *tensors: torch.Tensor) -> None:
    """Where FSDP2 shards `block`, gather its parameters when a gradient of one of `tensors` comes.

    FSDP2 itself waits for a gradient of the block's output, which has none where only its keys and values are used.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = [] if fsdp is None else [m for m in block.modules() if isinstance(m, fsdp.FSDPModule)]

    def gather(gradient: torch.Tensor) -> None:
        for module in sharded:
            module.unshard()

    for tensor in tensors:
        if sharded and tensor.requires_grad:
            tensor.register_hook(gather)


def _want_causal(model: Any) -> None:
    """Raise if the model is one of transformers that does not predict each token from those before it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(plain).__module__.startswith("transformers."):
        return
    kind = type(plain).__name__
    if plain.config.is_encoder_decoder:
        raise ValueError(f"model: got {kind}, an encoder with a decoder; wants a causal language model")
    if not plain.can_generate():
        raise ValueError(f"model: got {kind}, which generates no text; wants a causal language model with its head")


def _text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a multi-modal one; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _inside_no_other(name: str, lists: list[tuple[str, nn.ModuleList]], depth: int) -> bool:
    return not any(name.startswith(other + ".") for other, module in lists if len(module) == depth and other != name)
