"""`EchoLoRA`: the wrapper that turns a causal language model with adapters into one that trains with the echo."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations.adapters import AdaptedLinear, adapted_linears, layers_without_echo
from ..integrations.blocks import decoder_blocks, hidden_width
from ..integrations.heads import gives_logits, is_frozen_linear
from ..layers.network import EchoNetworks
from .branches import telling_arguments
from .config import EchoConfig
from .inject import Injector
from .output import EchoLoRAOutput
from .packed import packed_step, why_not_packed
from .route import echo_probability, routed
from .shared import shared_step, why_not_shared
from .two_pass import two_pass_step

_log = logging.getLogger(__name__)

# the forms of a step beside the two-pass one, in the order of choice: why not, and the step itself
_FORMS: dict[str, tuple[Callable[..., str | None], Callable[..., Any]]] = {
    "shared": (why_not_shared, shared_step),
    "packed": (why_not_packed, packed_step),
}


class EchoLoRA(nn.Module):
    """A causal language model that trains with the echo and is the plain model otherwise.

    ``L = L_off + r_k (L_on + lambda_kd L_kd)``; docs/method.md "Formulas".

    Args:
        model: a causal LM whose linears are PEFT LoRA/DoRA layers or `EchoLoRALinear`. Its forward takes input_ids
            [N, T] (and attention_mask [N, T]) and returns logits [N, T, V], or an output that has them.
        config: the choices of the method.

    Attributes:
        echo_networks: ModuleList of `EchoNetworks`, one for each device and dtype that the adapters are in; a network
            is called by the name of the module that it injects into.
        echo_config: the configuration. source_layers, target_layers: S and G as block numbers.
        step: k, optimizer steps taken so far; saved in the state dict.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: layers out of range or order; no adapter in the model, or none that trains in the target layers.
    """

    def __init__(self, model: nn.Module, config: EchoConfig) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wants a torch.nn.Module")
        if isinstance(model, EchoLoRA):
            raise TypeError("model: got an EchoLoRA, wants the plain model; call remove() on it first")
        if not isinstance(config, EchoConfig):
            raise TypeError(f"config: got {type(config).__name__}, wants an EchoConfig")
        blocks_name, blocks = decoder_blocks(model)
        self.source_layers, self.target_layers = config.layers(len(blocks))
        targets = _find_targets(model, config, blocks_name, self.target_layers)
        width = hidden_width(model)
        networks = _networks_for(targets, config, width)

        # nothing of the model has been touched up to here
        self.model, self.echo_config, self.step = model, config, 0
        self.echo_networks = nn.ModuleList(networks)
        self.targets: dict[str, AdaptedLinear] = targets
        self.source_blocks = [blocks[layer] for layer in self.source_layers]
        target_blocks = [blocks[layer] for layer in self.target_layers]
        self.injector = Injector(targets, target_blocks, config.dora_echo == "inside")
        self._echo_off = self._removed = False
        self._warned_unsupervised = self._warned_skipped = False
        self._told_forms: set[str] = set()
        self._gives_logits: bool | None = None
        self.train(model.training)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One training step's losses; in eval mode or under `echo_off()`, the plain model's own output.

        Args:
            input_ids: [N, T], int64.
            attention_mask: [N, T], nonzero where a position is real; None means everywhere.
            labels: [N, T], int64, -100 off the answer; the model shifts them.
            num_items_in_batch: supervised tokens of the whole optimizer step, to divide by under gradient
                accumulation; None means those of this batch.
            **kwargs: passed on to the model.

        Returns:
            `EchoLoRAOutput`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: after `remove()`, while a target's adapter is disabled or merged, or where the step_mode that
                was asked for cannot be done.
        """
        if self._removed:
            raise RuntimeError("this EchoLoRA was removed; use the model that remove() returned")
        self.injector.begin()
        if not self.training or self._echo_off:
            if labels is not None:
                kwargs["labels"] = labels
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        labels = _checked_labels(input_ids, attention_mask, labels)
        self._check_active()
        if getattr(getattr(self.model, "config", None), "use_cache", None) is not None:
            kwargs.setdefault("use_cache", False)

        logits: torch.Tensor | None = None
        form = self._form_of_step(telling_arguments(kwargs, attention_mask))
        if form is not None:
            losses, skipped = form(self, input_ids, labels, attention_mask, num_items_in_batch)
        else:

            def run_model() -> torch.Tensor:
                return _logits(self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs))

            losses, logits, skipped = two_pass_step(self, run_model, labels, attention_mask, num_items_in_batch)
        self._report_skipped(skipped, len(labels))
        return EchoLoRAOutput(
            loss=losses.loss,
            loss_off=losses.loss_off.detach(),
            loss_on=None if losses.loss_on is None else losses.loss_on.detach(),
            loss_kd=None if losses.loss_kd is None else losses.loss_kd.detach(),
            routed=self.routed,
            logits=None if logits is None else logits.detach(),
            skipped_samples=skipped,
        )

    @property
    def routed(self) -> bool:
        """r_k of the current optimizer step."""
        return routed(self.echo_config, self.step)

    @property
    def echo_probability(self) -> float:
        """p_k of the current optimizer step."""
        return echo_probability(self.echo_config, self.step)

    def advance(self) -> None:
        """Move the routing schedule one optimizer step; call it after `optimizer.step()`."""
        self.step += 1

    @contextmanager
    def echo_off(self) -> Iterator[EchoLoRA]:
        """Inside, this is the plain model, also in training mode."""
        before, self._echo_off = self._echo_off, True
        try:
            yield self
        finally:
            self._echo_off = before

    def remove(self) -> nn.Module:
        """Take the echo path out and give the plain model back; the wrapper cannot be used afterwards."""
        self.injector.remove()
        self._removed = True
        return self.model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The plain model's `save_pretrained`, an adapter's with PEFT; after any error an earlier one is as it was.

        Args:
            save_directory: a folder; files in it that are not written stay. **kwargs: passed on.

        Raises:
            AttributeError: the plain model has no such method.
            OSError: the folder could not be written.
        """
        save: Any = self.model.save_pretrained
        from ..integrations.saving import updating  # wants safetensors, which whoever saves has

        with updating(Path(save_directory)) as unfinished:
            if (card := Path(save_directory) / "README.md").is_file():  # which PEFT brings up to date
                shutil.copyfile(card, unfinished / card.name)
            save(str(unfinished), **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.step)  # a tensor, so that safetensors can hold the state dict

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.step = int(state)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: looking further would recurse
                raise
            return getattr(self.model, name)  # config, generate, device, ...: as on the plain model

    def losses_in_head(self, head: nn.Module) -> bool:
        """Whether the output head may compute the losses in place of logits."""
        if not is_frozen_linear(head):
            return False
        if self._gives_logits is None:
            with self.injector.injecting(None):
                self._gives_logits = gives_logits(self.model, head)
        return self._gives_logits

    def _form_of_step(self, extra: dict[str, Any]) -> Callable[..., Any] | None:
        """The form this step takes, None for the two-pass one; "auto" says once which and why."""
        mode = self.echo_config.step_mode
        if mode == "two-pass":
            return None
        reasons: list[str] = []
        for name, (why_not, form) in _FORMS.items():
            if mode not in ("auto", name):
                continue
            reason = why_not(self, extra)
            if reason is None:
                self._tell_form(name, reasons)
                return form
            if mode == name:
                raise RuntimeError(f"step_mode: got {mode!r}, which cannot be done: {reason}")
            reasons.append(f"not {name}, since {reason}")
        self._tell_form("two-pass", reasons)
        return None

    def _tell_form(self, name: str, reasons: list[str]) -> None:
        if name not in self._told_forms:
            self._told_forms.add(name)
            _log.info("Echo-LoRA takes %s steps%s", name, "".join(f"; {reason}" for reason in reasons))

    def _check_active(self) -> None:
        for target in self.targets.values():
            reason = target.why_inactive()
            if reason:
                raise RuntimeError(f"{target.name}: cannot train with the echo while {reason}")

    def _report_skipped(self, skipped: int, samples: int) -> None:
        if skipped == samples and not self._warned_unsupervised:
            self._warned_unsupervised = True
            warnings.warn("labels: no supervised token in the whole batch; its loss is 0", stacklevel=5)
        elif 0 < skipped < samples and not self._warned_skipped:
            self._warned_skipped = True
            warnings.warn(
                f"labels: {skipped} of {samples} samples have no supervised token and are skipped; "
                "`skipped_samples` of every output counts them",
                stacklevel=5,
            )


def _find_targets(
    model: nn.Module, config: EchoConfig, blocks_name: str, target_layers: tuple[int, ...]
) -> dict[str, AdaptedLinear]:
    adapters, others = adapted_linears(model), layers_without_echo(model)
    if not adapters:
        name, reason = next(iter(others.items()), ("", ""))
        but = f" ({name} takes no echo: {reason})" if others else ""
        raise ValueError(
            f"model: got no adapted linear{but}, wants PEFT LoRA/DoRA layers or EchoLoRALinear modules "
            "(for instance from peft.get_peft_model)"
        )
    prefixes = tuple(f"{blocks_name}.{layer}." for layer in target_layers)
    inside = [adapter for adapter in adapters if adapter.name.startswith(prefixes)]
    if not inside:
        raise ValueError(
            f"target_layers: got {list(target_layers)}, none of which has an adapted linear; "
            f"{len(adapters)} are elsewhere, the first at {adapters[0].name}"
        )
    if config.target_modules is None:
        chosen = inside
    else:
        names = {adapter.name.rpartition(".")[2] for adapter in inside}
        unknown = [name for name in config.target_modules if name not in names]
        if unknown:
            why = "".join(
                f"; {name}: {reason}" for name, reason in others.items() if name.rpartition(".")[2] in unknown
            )
            raise ValueError(
                f"target_modules: got {unknown}, wants names among the adapted linears {sorted(names)}{why}"
            )
        chosen = [adapter for adapter in inside if adapter.name.rpartition(".")[2] in config.target_modules]
    if not any(adapter.trainable().requires_grad for adapter in chosen):
        raise ValueError(
            "model: got adapters without a trainable parameter in the target layers, wants trainable ones "
            "(for instance PeftModel.from_pretrained(..., is_trainable=True))"
        )
    return {adapter.name: adapter for adapter in chosen}


def _networks_for(targets: dict[str, AdaptedLinear], config: EchoConfig, width: int) -> list[EchoNetworks]:
    groups: dict[tuple[torch.device, torch.dtype], dict[str, int]] = {}
    for name, target in targets.items():
        parameter = target.trainable()
        # Adam's steps would vanish in a dtype narrower than float32
        kind = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        groups.setdefault(kind, {})[name] = target.width(config.site)
    return [
        EchoNetworks(
            width,
            widths,
            config.bottleneck,
            gate_bias=config.gate_bias,
            scale=config.scale,
            device=device,
            dtype=dtype,
        )
        for (device, dtype), widths in groups.items()
    ]


def _checked_labels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: got {got}, wants an integer tensor [N, T]")
    if labels is None:
        raise ValueError("labels: got None, wants [N, T] while training; call eval() or use echo_off() without them")
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is None:
            continue
        if tensor.shape != input_ids.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wants {tuple(input_ids.shape)} as input_ids")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name}: got device {tensor.device}, wants {input_ids.device} as input_ids")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, wants torch.int64")
    return labels


def _logits(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        raise TypeError(f"model: its forward returned {type(output).__name__}, wants logits or an output with `logits`")
    return logits
