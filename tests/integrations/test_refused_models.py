"""Models, layers and versions that are not taken: each in one line that says what is wanted."""

import re
from pathlib import Path

import pytest
import tiny
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from echolora_kernels import EchoConfig, EchoLoRA, EchoLoRALinear, fuse
from echolora_kernels.integrations import versions
from echolora_kernels.integrations.adapters import adapted_linears, layers_without_echo

BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 61,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind, sizes):
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**sizes))


@pytest.mark.parametrize(("kind", "sizes", "what"), [
    ("BertForMaskedLM", BERT, "generates no text"), ("BertModel", BERT, "generates no text"),
    ("LlamaForSequenceClassification", BERT, "generates no text"), ("T5ForConditionalGeneration", T5, "an encoder"),
])  # fmt: skip
def test_what_is_no_causal_language_model(kind, sizes, what):
    model = get_peft_model(model_of(kind, sizes), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(
        ValueError, match=rf"^model: got {kind}, [^\n]*{what}[^\n]*; wants a causal language model[^\n]*$"
    ):
        EchoLoRA(model, EchoConfig())


def test_what_has_no_blocks():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"^model: got module lists \[\], wants at least one torch\.nn\.ModuleList"):
        EchoLoRA(model, EchoConfig())


@pytest.mark.parametrize("targets", [["embed_tokens"], "all"])
def test_an_embedding_takes_no_echo_and_the_reason_is_told(targets):
    targets = [*tiny.TARGETS, "embed_tokens"] if targets == "all" else targets
    model = get_peft_model(tiny.base_model(), LoraConfig(r=2, target_modules=targets))
    why = {"base_model.model.model.embed_tokens": "it adapts Embedding, not a linear"}
    assert layers_without_echo(model) == why
    config = EchoConfig(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.*adapts Embedding, not a linear") as refused:
        EchoLoRA(model, config)
    assert str(refused.value).startswith("target_modules" if len(targets) > 1 else "model: got no adapted linear")
    reasons = fuse(model).skipped
    assert reasons == {next(iter(why)): "PEFT's Embedding is not its plain Linear"}


def test_layers_of_other_methods_are_not_adapted_linears():
    model = get_peft_model(tiny.base_model(), IA3Config(target_modules=tiny.TARGETS, feedforward_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"^model: got no adapted linear, wants PEFT LoRA/DoRA layers"):
        EchoLoRA(model, EchoConfig())
    with pytest.raises(ValueError, match=r"^model: got no LoRA layer of PEFT"):
        fuse(model)


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_linears_take_an_echo_but_are_not_fused(dora):
    """GPT-2's Conv1D is a linear whose weight lies the other way."""
    model = get_peft_model(
        model_of("GPT2LMHeadModel", GPT2), LoraConfig(r=2, use_dora=dora, target_modules=["c_attn", "c_fc"])
    )
    assert len(adapted_linears(model)) == 8 and not layers_without_echo(model)
    report = fuse(model)
    assert not report.fused and len(report.skipped) == 8
    assert set(report.skipped.values()) == {"the base layer is a Conv1D, not a plain Linear"}
    echo = tiny.randomise(EchoLoRA(model, tiny.always_on())).train()
    output = echo(**tiny.batch())
    output.loss.backward()
    gradients = [parameter.grad for parameter in echo.echo_networks.parameters()]
    assert output.routed and all(gradient.isfinite().all() for gradient in gradients) and gradients[0].any()
    with pytest.raises(TypeError, match=r"got Conv1D, wants .*Linear"):
        EchoLoRALinear.from_linear(Conv1D(4, 4))


def test_the_range_of_peft_versions_is_the_one_that_is_installed():
    (stated,) = re.findall(r'"peft([^"]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert stated == versions.SUPPORTED["peft"]


@pytest.mark.parametrize(("found", "taken"), [
    ("0.18.1", False), ("0.19.0", True), ("0.21.2", True), ("0.21.3.dev0", True), ("0.22.0.dev0", False), ("1.0", False),
])  # fmt: skip
def test_versions_of_peft(found, taken, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: found)
    model = tiny.peft_model()
    uses = [lambda: fuse(model), lambda: EchoLoRA(model, EchoConfig())]
    for use in uses:
        if taken:
            use()
            continue
        with pytest.raises(
            ImportError, match=r"^peft: got [^\n]*, wants >=[^\n]*; pip install 'peft>=[^\n]*'$"
        ) as refused:
            use()
        assert found in str(refused.value)
    EchoLoRA(tiny.native_model(), EchoConfig())  # which has nothing of PEFT


def test_peft_that_is_not_there(monkeypatch):
    def absent(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", absent)
    with pytest.raises(ImportError, match=r"^peft: is not installed, wants .*; pip install 'peft"):
        versions.want_supported("peft")
