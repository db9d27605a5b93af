"""transformers' Trainer, TRL's SFTTrainer and their like with an `EchoLoRA` as the model.

`EchoCallback` suffices for a trainer as it is. `EchoTrainerMixin`, before a trainer class, makes ``save_model`` write a
PEFT adapter, shows the losses to everything that logs, and is what trainers need that compute losses of their own.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import CheckpointError
from ..method import EchoLoRA, EchoLoRAOutput
from .saving import updating

__all__ = ["EchoCallback", "EchoTrainer", "EchoTrainerMixin"]

_LOSSES = ("loss_off", "loss_on", "loss_kd")


class EchoCallback(TrainerCallback):
    """Moves the routing on with every optimizer step, logs the losses of both branches, and keeps checkpoints small.

    Logged beside the trainer's own `loss` are means over the optimizer steps since the last time: `loss_off`, `routed`,
    `echo_probability`, and over the routed ones `loss_on` and `loss_kd`, if there were any; the same on all ranks.

    From the trainer's construction on, ``state_dict()`` of the `EchoLoRA` holds what trains and the routing step alone,
    which is what a checkpoint needs, and ``load_state_dict`` wants no more. Our choice (O).

    Raises:
        TypeError: the trainer's model is no EchoLoRA.
        CheckpointError: a checkpoint that is loaded lacks something that trains.
    """

    def __init__(self) -> None:
        self._collecting: Any = None
        self._micro: list[tuple[bool, EchoLoRAOutput]] = []
        self._start_again()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(model, EchoLoRA):  # a mixin shows the trainer another model at first
            _keep_what_trains(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        echo = _echo_of(model)
        _keep_what_trains(echo)
        self._stop_collecting()
        self._start_again()
        self._collecting = echo.register_forward_hook(self._collect, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        echo = _echo_of(model)
        for name in _LOSSES:
            # divided by the tokens of the whole step they add up, else each is a mean
            parts = [
                output[name] if whole else output[name] / len(self._micro)
                for whole, output in self._micro
                if output[name] is not None
            ]
            if parts:
                self._sums[name] = self._sums.get(name, 0) + torch.stack(parts).sum()
        self._adding = all(whole for whole, _ in self._micro) and args.average_tokens_across_devices
        self._micro.clear()
        self._steps += 1
        self._routed += echo.routed
        self._probability += echo.echo_probability
        echo.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs or not self._steps:  # an evaluation's, or the summary at the end
            return
        means: dict[str, float] = {}
        if self._sums:
            sums = torch.stack([value.float() for value in self._sums.values()])
            if dist.is_initialized():
                dist.all_reduce(sums)
                if not self._adding:
                    sums /= dist.get_world_size()
            for name, value in zip(self._sums, sums.tolist(), strict=True):
                means[name] = value / (self._steps if name == "loss_off" else self._routed)
        means["routed"] = self._routed / self._steps
        means["echo_probability"] = self._probability / self._steps
        logs.update(means)
        state.log_history[-1].update(means)  # which the trainer has copied before
        self._start_again()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_collecting()

    def _start_again(self) -> None:
        self._sums: dict[str, Any] = {}
        self._steps = self._routed = 0
        self._probability = 0.0
        self._adding = True

    def _stop_collecting(self) -> None:
        if self._collecting is not None:
            self._collecting.remove()
            self._collecting = None
        self._micro.clear()

    def _collect(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, EchoLoRAOutput):
            kept = EchoLoRAOutput({name: output[name] for name in _LOSSES})  # no logits, no graph
            self._micro.append((kwargs.get("num_items_in_batch") is not None, kept))


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class EchoTrainerMixin(_Base):
    """Before a trainer class, makes it train an `EchoLoRA`: ``class EchoSFTTrainer(EchoTrainerMixin, SFTTrainer)``.

    The trainer is made for the plain model and trains the EchoLoRA; an `EchoCallback` is added, before all others, if
    there is none. Training takes the EchoLoRA's loss whatever the trainer's own, evaluation the trainer's own on the
    plain model. ``save_model`` writes the plain model's adapter, or after any error leaves an earlier one as it was; a
    checkpoint has it beside what a resume needs.
    Our choice (O).

    Args:
        model: the EchoLoRA. The rest are the trainer's own.

    Raises:
        TypeError: model is no EchoLoRA.
        ValueError: an option of the trainer's asks for another loss, or for several samples in one row.
    """

    def __init__(self, model: EchoLoRA, args: Any = None, *others: Any, **named: Any) -> None:
        echo = _echo_of(model)
        _check_options(args)
        super().__init__(echo.model, args, *others, **named)
        self.model = self.model_wrapped = self.callback_handler.model = echo
        if self.place_model_on_device:
            self._move_model_to_device(echo, self.args.device)  # the echo networks are not there yet
        callbacks = self.callback_handler.callbacks
        ours = [callback for callback in callbacks if isinstance(callback, EchoCallback)] or [EchoCallback()]
        # first, so that those which report logs see its losses
        self.callback_handler.callbacks = [*ours, *(callback for callback in callbacks if callback not in ours)]
        _keep_what_trains(echo)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call)
        folder, echo = Path(str(output_dir or self.args.output_dir)), self.model
        self.model = _echo_of(echo).model
        try:
            # the others take part and write nothing
            with updating(folder) if self.args.should_save else nullcontext(folder) as unfinished:
                super().save_model(str(unfinished), _internal_call)
        finally:
            self.model = echo


class EchoTrainer(EchoTrainerMixin, Trainer):
    """transformers' Trainer for an `EchoLoRA`; see `EchoTrainerMixin`."""


def _echo_of(model: Any) -> EchoLoRA:
    inner = getattr(model, "module", model) if not isinstance(model, EchoLoRA) else model
    if not isinstance(inner, EchoLoRA):
        raise TypeError(f"model: got {type(model).__name__}, wants an EchoLoRA")
    return inner


def _check_options(args: Any) -> None:
    for name, wanted in (
        ("loss_type", "nll"),
        ("label_smoothing_factor", 0),
        ("packing", False),
        ("padding_free", False),
    ):
        got = getattr(args, name, wanted)
        if got != wanted:
            raise ValueError(f"args.{name}: got {got!r}, wants {wanted!r} with an EchoLoRA")


def _keep_what_trains(echo: EchoLoRA) -> None:
    """From now on the state dict is what trains and the routing step; frozen weights are neither saved nor missed."""
    if _drop_frozen not in echo._state_dict_hooks.values():
        echo.register_state_dict_post_hook(_drop_frozen)
        echo.register_load_state_dict_post_hook(_want_what_trains)


def _trained_names(echo: nn.Module) -> set[str]:
    return {name for name, parameter in echo.named_parameters() if parameter.requires_grad} | {"_extra_state"}


def _drop_frozen(echo: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    kept = {prefix + name for name in _trained_names(echo)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _want_what_trains(echo: nn.Module, incompatible: Any) -> None:
    missing = sorted(_trained_names(echo).intersection(incompatible.missing_keys))
    if missing:
        raise CheckpointError(f"state_dict: lacks {', '.join(missing)}, which train")
    incompatible.missing_keys.clear()
