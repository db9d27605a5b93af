"""Forward + backward of one linear: frozen alone, PEFT, and `EchoLoRALinear`, at SmolLM2-135M's shapes.

Run with `make bench`. Every case is first checked against float64; a red check reports no time.
"""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from echolora_kernels import Echo, EchoLoRALinear

TOKENS, SAMPLES, RANK = 1024, 8, 16
SHAPES = {"q_proj": (576, 576), "k_proj": (576, 192), "up_proj": (576, 1536), "down_proj": (1536, 576)}


def frozen_linear(base, dora):
    return base


def peft_layer(base, dora):
    config = LoraConfig(r=RANK, lora_alpha=32, use_dora=dora)
    return PeftLinear(base, "default", config, r=RANK, lora_alpha=32)


def our_layer(base, dora):
    return EchoLoRALinear.from_linear(base, r=RANK, lora_alpha=32, use_dora=dora)


LAYERS = {
    "frozen": (frozen_linear, False, False),
    "peft-lora": (peft_layer, False, False),
    "ours-lora": (our_layer, False, False),
    "ours-lora-echo": (our_layer, False, True),
    "peft-dora": (peft_layer, True, False),
    "ours-dora": (our_layer, True, False),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_backward(benchmark, name, shape):
    make, dora, with_echo = LAYERS[name]
    d_in, d_out = SHAPES[shape]
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    layer = make(base, dora)
    x = torch.randn(SAMPLES, TOKENS // SAMPLES, d_in, requires_grad=True)
    grad = torch.randn(SAMPLES, TOKENS // SAMPLES, d_out)
    extra = {}
    if with_echo:
        mask = torch.arange(TOKENS // SAMPLES).expand(SAMPLES, -1) >= 112
        extra["echo"] = Echo(torch.randn(SAMPLES, d_out, requires_grad=True), mask)

    with torch.no_grad():  # B is zero: the layer must give the frozen product, and the echo on top
        expected = x.double() @ base.weight.double().T
        if with_echo:
            expected = expected + extra["echo"].spread()
        assert (layer(x, **extra) - expected).abs().max() < 1e-4

    def step():
        layer(x, **extra).backward(grad)

    benchmark.group = f"{shape} {d_in} -> {d_out}"
    benchmark.pedantic(step, warmup_rounds=3, rounds=20)
