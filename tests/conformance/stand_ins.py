"""Small random models in place of those that PEFT's tests load from the hub, laid out as the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1200,
    "max_position_embeddings": 512,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1200, "n_positions": 512}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1200,
}
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1200,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 1200}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 1200,
}

# hub name -> class in transformers, sizes
STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _LLAMA),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}


def make_cache(folder: Path) -> Path:
    """`folder` as HF_HOME, whose hub has the stand-ins."""
    for number, (name, (kind, sizes)) in enumerate(STAND_INS.items()):
        torch.manual_seed(number)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**sizes))
        place, commit = folder / "hub" / f"models--{name.replace('/', '--')}", f"{number:040x}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        model.save_pretrained(place / "snapshots" / commit)
    return folder
