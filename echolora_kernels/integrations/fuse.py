"""`fuse` and `unfuse`: the LoRA and DoRA linears of a live PEFT model computed by our operators."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .. import backends
from .versions import want_supported


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; `str()` of it is a table, in which blocks of one kind share a line.

    Attributes:
        fused: names of the layers that our operators compute.
        skipped: name of each LoRA layer or adapter that PEFT goes on computing -> why.
        grouped: names of those fused layers that their parent calls with one input: computed together where that pays
            and changes nothing (docs/python.md "PEFT models").
    """

    fused: tuple[str, ...]
    skipped: dict[str, str]
    grouped: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        rows = [("fused", _pattern(name), "") for name in self.fused]
        rows += [("grouped", _pattern(_together(names)), "") for names in self.grouped]
        rows += [("skipped", _pattern(name), reason) for name, reason in self.skipped.items()]
        lines = [("", "layers", "module", "why")]
        lines += [(state, str(count), name, why) for (state, name, why), count in Counter(rows).items()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            f"{state:{widths[0]}}  {count:>{widths[1]}}  {name:{widths[2]}}  {why}".rstrip()
            for state, count, name, why in lines
        )


def fuse(model: nn.Module, *, backend: str | None = None, strict: bool = False) -> FuseReport:
    """Let our operators compute every PEFT LoRA or DoRA linear of `model`, in place.

    Each layer gets a forward of its own that decides at every call: one active adapter of plain LoRA or DoRA on an
    nn.Linear goes through `functional.echo_lora_linear`, on a linear of bitsandbytes or torchao through that and
    `functional.lora_update`; all else (merged, disabled or several adapters, adapter_names, other variants) through
    PEFT's forward. Layers that their parent's forward calls with one input, such as q, k and v, go through
    `functional.echo_lora_linear_group` together, unless they are quantised. State dict, parameters and hooks stay as
    they are. Our choice (O); docs/python.md "PEFT models".

    Args:
        model: a PeftModel, or any module that contains PEFT's LoRA layers.
        backend: None chooses at each call, a name insists; a fused model is fused anew with it.
        strict: raise if any LoRA layer or adapter cannot be fused.

    Returns:
        The report; LoRA layers that PEFT makes afterwards are not fused until `fuse` is called again.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layer of PEFT; no backend has that name; or strict and something would be skipped,
            and the message lists what and why. Nothing is changed then.
        BackendUnavailable: `backend` names one that cannot run here.
        ImportError: PEFT is of a version that is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wants a torch.nn.Module")
    backends.choose("echo_lora_linear", backend)
    if "peft" not in sys.modules:  # without it there cannot be a LoRA layer
        raise ValueError("model: got no LoRA layer of PEFT, wants at least one (from peft.get_peft_model)")
    want_supported("peft")
    from .fused import FusedForward, lora_layers_of, why_not_adapter
    from .grouped import group_children, ungroup
    from .quantised import is_quantised

    layers = lora_layers_of(model)
    if not layers:
        raise ValueError("model: got no LoRA layer of PEFT, wants at least one (from peft.get_peft_model)")
    fused, skipped = [], {}
    for name, (module, reason) in layers.items():
        replaced = module.__dict__.get("forward")
        if reason is None and replaced is not None and not isinstance(replaced, FusedForward):
            reason = "its forward has been replaced"
        if reason is not None:
            skipped[name] = reason
            continue
        reasons = {adapter: why_not_adapter(module, adapter) for adapter in module.lora_A}
        for adapter, why in reasons.items():
            if why is not None:
                skipped[f"{name} ({adapter})"] = why
        if None in reasons.values():
            fused.append(name)
    if strict and skipped:
        raise ValueError(f"model: strict, but PEFT has to compute\n{FuseReport((), skipped)}")
    for module in model.modules():
        ungroup(module)
    for name in fused:
        module = layers[name][0]
        module.forward = FusedForward(module, backend)
    whole = [name for name in fused if not is_quantised(layers[name][0])]
    return FuseReport(tuple(fused), skipped, group_children(model, whole))


def unfuse(model: nn.Module) -> None:
    """Give every fused layer of `model` PEFT's forward back; nothing of `fuse` is left in it."""
    if "peft" not in sys.modules:
        return
    from .fused import FusedForward
    from .grouped import ungroup

    for module in model.modules():
        ungroup(module)
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.forward


def _together(names: tuple[str, ...]) -> str:
    parent = names[0].rpartition(".")[0]
    return f"{parent}.({', '.join(name.rpartition('.')[2] for name in names)})".lstrip(".")


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
