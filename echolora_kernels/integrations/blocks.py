"""Finding the decoder blocks of a causal language model."""

from __future__ import annotations

from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks of `model`.

    The list is the nn.ModuleList with as many entries as the text configuration's `num_hidden_layers`; without such a
    configuration the longest nn.ModuleList.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    depth = _configured_depth(model)
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


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "num_hidden_layers", None)


def _inside_no_other(name: str, lists: list[tuple[str, nn.ModuleList]], depth: int) -> bool:
    return not any(name.startswith(other + ".") for other, module in lists if len(module) == depth and other != name)
