"""Training steps without the optimizer: plain LoRA, and Echo-LoRA in each form, by PEFT's layers and by ours."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import EchoConfig, EchoLoRA, EchoLoRALinear, fuse, unfuse
from ..batches import EchoDataCollator
from ..models import MODELS, TASKS, Model
from .cases import DTYPES, Case
from .problem import OTHERS_LIMIT, Implementation, Problem, Tensors

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

_WIDEST_ON_CPU = 1024  # wider models take minutes a step, and more memory than most have


def build(case: Case, device: torch.device) -> Problem:
    """A model of the case's sizes with random weights, and one batch as long as the task's.

    Without transformers there is nothing to time; without PEFT the layers are `EchoLoRALinear` from the start.
    """
    if importlib.util.find_spec("transformers") is None:
        return Problem(None, {}, {"all": "transformers is not installed"})
    if MODELS[case.model].width > _WIDEST_ON_CPU and device.type == "cpu":
        return Problem(None, {}, {"all": "a model of this size is timed on GPUs alone"})
    checkpointing, dtype = "checkpointed" in case.options, DTYPES[case.dtype]
    assert case.rows is not None and case.rank is not None
    sizes = MODELS[case.model]
    with_peft = importlib.util.find_spec("peft") is not None
    adapt = _by_peft if with_peft else _by_ours

    rank = case.rank

    def make() -> EchoLoRA:
        with torch.device(device):
            model = adapt(_base(sizes, dtype), rank, case.method == "dora")
        return EchoLoRA(model, EchoConfig(echo_end_probability=1.0)).train()

    model = make()
    _move_from_zero(model)
    if checkpointing:
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers means to rename it
            model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: each.to(device) for name, each in batch_of(case.part, case.rows, sizes.vocabulary).items()}
    forms = ("plain", "two-pass", "packed" if checkpointing else "shared")
    kinds = ("peft", "ours") if with_peft else ("ours",)
    truth = _Truth(model, make, batch)
    found = {f"{form}-{kind}": _step(model, batch, form, kind, truth) for form in forms for kind in kinds}
    absent = {} if with_peft else {"plain-peft": "peft is not installed"}
    return Problem(f"plain-{kinds[0]}", found, absent)


def batch_of(task: str, samples: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens; prompts up to a tenth longer or shorter than the task's mean, as a batch of like lengths has."""
    prompt, answer = TASKS[task]
    draw = random.Random(task)
    features = []
    for index in range(samples):
        length = round(prompt * (0.9 + 0.2 * index / max(samples - 1, 1)))
        ids = [draw.randrange(1, vocabulary) for _ in range(length + answer)]
        features.append({"input_ids": ids, "prompt_length": length})
    return EchoDataCollator(0)(features)


def _base(sizes: Model, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_width,
        tie_word_embeddings=sizes.tied,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").requires_grad_(False)


def _by_peft(model: Any, rank: int, dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), use_dora=dora)
    return get_peft_model(model, config)


def _by_ours(model: Any, rank: int, dora: bool) -> Any:
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS:
            layer = EchoLoRALinear.from_linear(module, r=rank, lora_alpha=2 * rank, use_dora=dora)
            setattr(model.get_submodule(parent), leaf, layer)
    return model


@torch.no_grad()
def _move_from_zero(model: nn.Module) -> None:
    """So that every gradient matters."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(("proj_up", "gate_up")):
            parameter.normal_(0, 0.02)


def _step(model: EchoLoRA, batch: dict[str, torch.Tensor], form: str, kind: str, truth: _Truth) -> Implementation:
    leaves = {
        f"parameters {name}": parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (form == "plain" and name.startswith("echo_networks"))
    }
    forward = functools.partial(_loss, model, batch, form)
    limit = OTHERS_LIMIT if kind == "peft" else Implementation.limit
    expected = functools.partial(truth.expected, form == "plain")
    return Implementation(
        lambda: [forward()], leaves, None, expected, limit=limit, computed_in=model.dtype,
        prepare=_preparation(model, form, kind),
    )  # fmt: skip


def _preparation(model: EchoLoRA, form: str, kind: str) -> Callable[[], None]:
    def prepare() -> None:
        unfuse(model)
        if kind == "ours" and importlib.util.find_spec("peft") is not None:
            fuse(model, strict=True)
        if form != "plain":
            model.echo_config = dataclasses.replace(model.echo_config, step_mode=form)

    return prepare


def _loss(model: EchoLoRA, batch: dict[str, torch.Tensor], form: str) -> torch.Tensor:
    if form != "plain":
        return model(**batch).loss
    with model.echo_off():
        return model(**batch, use_cache=False).loss


class _Truth:
    """What two passes of unfused layers give, in the model's dtype and in float64; plain steps without the echo."""

    def __init__(self, model: EchoLoRA, make: Callable[[], EchoLoRA], batch: dict[str, torch.Tensor]) -> None:
        self.model, self.make, self.batch = model, make, batch
        self._known: dict[bool, tuple[Tensors, Tensors]] = {}

    def expected(self, plain: bool) -> tuple[Tensors, Tensors]:
        """Loss and gradients."""
        if plain not in self._known:
            form = "plain" if plain else "two-pass"
            self._known[plain] = self._results(self.model, form), self._results(self._wide(), form)
        return self._known[plain]

    def _wide(self) -> EchoLoRA:
        wide = self.make()
        wide.load_state_dict(self.model.state_dict())
        for name, module in list(wide.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):  # transformers' own computes in float32
                norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon)
                norm.weight = module.weight
                parent, _, leaf = name.rpartition(".")
                setattr(wide.get_submodule(parent), leaf, norm)
        return wide.double()

    def _results(self, model: EchoLoRA, form: str) -> Tensors:
        step = _step(model, self.batch, form, "peft", self)
        step.prepare()
        outputs = step.forward()
        gradients = zip(step.leaves, step.backward(outputs), strict=True)
        return {"y0": outputs[0].detach(), **{f"d{name}": gradient for name, gradient in gradients}}
