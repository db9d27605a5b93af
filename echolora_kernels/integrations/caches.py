"""Keys and values of transformers models, kept in the graph so that later passes can attend to them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def why_no_cache(model: nn.Module) -> str | None:
    """None where `model` can run in parts that attend to earlier ones, else the reason why it cannot."""
    reason = why_not_in_parts(model)
    if reason is None and not {"cache", "past_key_values"} & set(
        inspect.signature(inner_model(model).forward).parameters
    ):
        reason = f"{type(inner_model(model)).__name__} takes no cache"
    return reason


def why_not_in_parts(model: nn.Module) -> str | None:
    """None where `model` computes the same of a token wherever it stands, given its position, else the reason."""
    transformers = sys.modules.get("transformers")
    inner = inner_model(model)
    if transformers is None or not isinstance(inner, transformers.PreTrainedModel):
        return f"{type(inner).__name__} is no transformers model, whose keys and values could be kept"
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(inner.forward).parameters):
        return f"{type(inner).__name__} does not take position_ids and logits_to_keep"
    if getattr(inner, "_is_stateful", False):
        return f"{type(inner).__name__} keeps a state that is more than keys and values"
    config = inner.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"{type(inner).__name__} has layers of {', '.join(sorted(other))}"
    return None


def run_with_cache(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, logits_to_keep: int
) -> torch.Tensor:
    """Logits of the last `logits_to_keep` positions (0: of all), [N, W, V]; `cache` gains their keys and values.

    Args:
        ids, positions: [N, W]. mask: [N, cached + W], bool; where a token is real.
    """
    name = "cache" if "cache" in inspect.signature(inner_model(model).forward).parameters else "past_key_values"
    output = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=logits_to_keep,
        **{name: cache},
    )
    return output.logits


def new_cache() -> Any:
    """An empty cache whose every layer keeps all positions; models mask out what a sliding window does not see.

    A block that is recomputed in the backward pass would add its keys a second time: the cache refuses them then.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    cache.update = _refusing_recomputation(cache.update)
    return cache


def _refusing_recomputation(update: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*arguments: Any, **named: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a block is recomputed in the backward pass of a shared step, by a kind of checkpointing that is not "
                'seen before; use the model\'s gradient_checkpointing_enable(), or step_mode="two-pass"'
            )
        return update(*arguments, **named)

    return guarded


def repeated_cache(cache: Any, length: int, times: int) -> Any:
    """The first `length` positions of `cache`, `times` over along the batch: a new cache, in the same graph."""
    result = new_cache()
    for index, layer in enumerate(cache.layers):
        # also where length is 0: ranks whose parameters are sharded must all have the same graph
        result.update(*(_repeated(t[:, :, :length], times) for t in (layer.keys, layer.values)), index)
    return result


def _repeated(states: torch.Tensor, times: int) -> torch.Tensor:
    return states if times == 1 else states.repeat(times, 1, 1, 1)


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or `model` itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
