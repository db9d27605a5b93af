"""Fused layers of one parent that are called with one input: the first that is called computes all of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import echo_lora_linear_group
from ..ops.echo_lora_linear import Projection
from ..ops.echo_lora_linear.autograd import traced
from ..ops.echo_lora_linear.rows import autocast_dtype
from .fused import FusedForward, operator_arguments
from .siblings import called_with_one_input

MIN_ROWS = 256  # with fewer, deciding costs more time than one read of x saves; without gradients it always does


@dataclass(frozen=True)
class _Held:
    """The output of a member that has not been called yet, and all that it was computed from."""

    output: torch.Tensor
    state: tuple
    sources: tuple  # kept alive: `state` has their addresses


@dataclass
class _Call:
    """One call of the parent's forward."""

    parent: nn.Module
    held: dict[FusedForward, _Held] | None = None  # None until the first member is called


class Group:
    """Some children of one parent. Its hooks `enter` and `leave` bound the life of what is held.

    A member that is called takes the output held for it if that is what it would compute itself: the very same tensors,
    unchanged, in the same modes. Whether a call computes together follows from the modules as they are then and from
    nothing that was before, so that a recomputation decides as the forward pass did.

    Args:
        names: of the children.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._calls: dict[int, _Call] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}

    def enter(self, parent: nn.Module, args: Any) -> None:
        """Hook before the parent's forward."""
        if not torch.compiler.is_compiling():
            self._calls[threading.get_ident()] = _Call(parent)

    def leave(self, parent: nn.Module, args: Any, output: Any) -> None:
        """Hook after the parent's forward, also when it raises."""
        if not torch.compiler.is_compiling():
            self._calls.pop(threading.get_ident(), None)

    def output(self, member: FusedForward, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What `member` computes from x, computed with the others or held since then; None: compute it alone.

        Args:
            arguments: what `operator_arguments` says of the member now.
        """
        call = None if torch.compiler.is_compiling() else self._calls.get(threading.get_ident())
        if call is None:
            return None
        if call.held is None:
            call.held = {}
            return self._lead(call, member, x, arguments)
        held = call.held.pop(member, None)
        return held.output if held is not None and held.state == _state(x, arguments) else None

    def _lead(self, call: _Call, leader: FusedForward, x: torch.Tensor, own: dict[str, Any]) -> torch.Tensor | None:
        if not _computes_for_others(x) or not _joins(leader, own, own):
            return None
        members = {leader: own}
        for name in self.names:
            child: Any = call.parent._modules.get(name)
            other = None if child is None else child.__dict__.get("forward")
            if not isinstance(other, FusedForward) or other.group is not self or other.backend != leader.backend:
                continue
            arguments = own if other is leader else operator_arguments(child, x)
            if arguments is not None and _joins(other, arguments, own):
                members[other] = arguments
        if len(members) == 1:
            return None
        projections = [
            Projection(a["weight"], a["bias"], a["lora_a"], a["lora_b"], a["scaling"], a["magnitude"])
            for a in members.values()
        ]
        states = [_state(x, arguments) for arguments in members.values()]
        outputs = echo_lora_linear_group(x, projections, backend=leader.backend)
        first, *others = [
            _Held(output, state, (x, arguments))
            for output, state, arguments in zip(outputs, states, members.values(), strict=True)
        ]
        call.held = dict(zip(list(members)[1:], others, strict=True))
        return first.output


def group_children(model: nn.Module, fused: list[str]) -> tuple[tuple[str, ...], ...]:
    """Group those of the layers `fused` of `model` whose parent calls them with one input; the names of each group."""
    children: dict[str, list[str]] = {}
    for name in fused:
        parent_name, _, child = name.rpartition(".")
        children.setdefault(parent_name, []).append(child)
    found = []
    for parent_name, names in children.items():
        parent = model.get_submodule(parent_name)
        for called in called_with_one_input(parent):
            members = tuple(child for child in called if child in names)
            if len(members) > 1:
                _install(Group(members), parent)
                found.append(tuple(f"{parent_name}.{child}".lstrip(".") for child in members))
    return tuple(found)


def _install(group: Group, parent: nn.Module) -> None:
    for name in group.names:
        getattr(parent, name).forward.group = group
    parent.register_forward_pre_hook(group.enter)
    parent.register_forward_hook(group.leave, always_call=True)


def ungroup(parent: nn.Module) -> None:
    """Take the hooks of every group out of `parent`."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Group)]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def _computes_for_others(x: torch.Tensor) -> bool:
    """Whether it pays to compute together now, what is computed can be handed on, and a change of x is noticed."""
    pays = torch.is_grad_enabled() and x.numel() >= MIN_ROWS * x.shape[-1]
    plain = type(x) in (torch.Tensor, nn.Parameter) and not x.is_inference()
    return pays and plain and not traced() and not torch._C._are_functorch_transforms_active()


def _joins(member: FusedForward, arguments: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether the member can be computed together with the first one, from the first one's input."""
    module = member.module
    receives_x = not (
        module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook()
    )
    weight, lora_a, bias = arguments["weight"], arguments["lora_a"], arguments["bias"]
    return (
        receives_x
        and arguments["dropout_p"] == 0  # in PEFT every projection drops elements of its own
        and bias is module.base_layer.bias  # not a sum with a lora_bias, made anew at each call
        and lora_a.dtype == first["lora_a"].dtype
        and (weight.device, weight.shape[1]) == (first["weight"].device, first["weight"].shape[1])
        and not any(tensor is not None and tensor.is_inference() for tensor in _tensors(arguments))
    )


def _tensors(arguments: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    return tuple(arguments[name] for name in ("weight", "bias", "lora_a", "lora_b", "magnitude"))


def _state(x: torch.Tensor, arguments: dict[str, Any]) -> tuple:
    """Equal for two calls only if they compute the same."""
    return (
        torch.is_grad_enabled(),
        autocast_dtype(x.device.type),
        arguments["scaling"],
        arguments["dropout_p"],
        *(
            tensor is not None and (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
            for tensor in (x, *_tensors(arguments))
        ),
    )
