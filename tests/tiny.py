"""Tiny models of every supported family, with adapters, and batches for them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from echolora_kernels import EchoConfig, EchoLoRA, EchoLoRALinear, EchoNetworks
from echolora_kernels.layers.network import NetworkParameters

VOCAB, WIDTH = 61, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
FAMILIES = {
    "llama": LlamaConfig,
    "llama-tied": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}


def base_model(family: str = "llama", dtype: torch.dtype = torch.float64, **changes):
    """A random causal LM of 6 blocks; sliding windows are 5 positions where the family has them."""
    extra = {"llama-tied": {"tie_word_embeddings": True}, "mistral": {"sliding_window": 5}}.get(family, {})
    if family.startswith("gemma"):
        extra = {"sliding_window": 5}
    if family == "gemma2":  # has eager attention alone, which turns padded float64 rows into NaN
        extra["attn_implementation"], dtype = "eager", torch.float32
    config = FAMILIES[family](**{**_SIZES, **extra, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 leaves every logit alike
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model.to(dtype)


def peft_model(family: str = "llama", dtype: torch.dtype = torch.float64, *, dropout=0.0, dora=False, **changes):
    """The same with a PEFT adapter whose B is not zero, so that every parameter matters."""
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, use_dora=dora, target_modules=TARGETS)
    model = get_peft_model(base_model(family, dtype, **changes), config, autocast_adapter_dtype=False)
    return randomise(model)


def native_model(family: str = "llama", dtype: torch.dtype = torch.float64, *, dropout=0.0, dora=False, **changes):
    """The same with every target replaced by an `EchoLoRALinear`."""
    model = base_model(family, dtype, **changes).requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS:
            layer = EchoLoRALinear.from_linear(module, r=3, lora_alpha=6, lora_dropout=dropout, use_dora=dora)
            setattr(model.get_submodule(parent), leaf, layer)
    return randomise(model)


def randomise(model):
    """Non-zero values for what starts at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(("proj_up", "gate_up")):
                parameter.normal_(0, 0.3)
    return model


MAKERS = {"peft": peft_model, "native": native_model}


def echo_model(
    kind: str = "peft", config: EchoConfig | None = None, *, moved: bool = True, **model_options
) -> EchoLoRA:
    """An `EchoLoRA` in training mode that routes every step; with `moved`, its echo is not zero."""
    config = config or always_on()
    wrapped = EchoLoRA(MAKERS[kind](**model_options), config).train()
    return randomise(wrapped) if moved else wrapped


def always_on(**choices) -> EchoConfig:
    """Every step routed, in the two-pass form: the reference, whose every position can be looked at."""
    defaults = {"echo_end_probability": 1.0, "total_steps": 10, "scale": 1.0, "gate_bias": 0.0}
    return EchoConfig(**{**defaults, "step_mode": "two-pass", **choices})


def sample(prompt: int, answer: int) -> tuple[list[int], list[int]]:
    """Token numbers and labels, from torch's generator."""
    ids = torch.randint(1, VOCAB, (prompt + answer,)).tolist()
    return ids, [-100] * prompt + ids[prompt:]


def pad(samples, side: str = "right", length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of (ids, labels), padded with token 0 and label -100."""
    length = length or max(len(ids) for ids, _ in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in samples:
        fill = length - len(ids)
        for key, values, blank in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, -100),
        ):
            padding = [blank] * fill
            rows[key].append(padding + values if side == "left" else values + padding)
    return {key: torch.tensor(value) for key, value in rows.items()}


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Three samples of different lengths."""
    return pad([sample(5, 3), sample(8, 2), sample(3, 4)], side)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def network_gradients(networks: EchoNetworks) -> dict[str, NetworkParameters]:
    """The gradients of each network, by the name of its module."""
    held = copy.deepcopy(networks)
    with torch.no_grad():
        for parameter, other in zip(held.parameters(), networks.parameters(), strict=True):
            parameter.copy_(other.grad)
    return {name: held.network(name) for name in networks.out_features}
