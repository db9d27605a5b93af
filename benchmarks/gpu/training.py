"""A small model trained with Echo-LoRA and Echo-DoRA by kernels and by plain torch: the losses have to fall alike.

    python benchmarks/gpu/training.py --device cuda --backend triton --dtype float32

Needs transformers, and neither PEFT nor weights nor data: the model is random, and learns to repeat its prompt's first tokens.
Exit status 1 where the mean loss of the last steps differs by more than 5 %, or does not fall.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echolora_kernels import EchoConfig, EchoDataCollator, EchoLoRA, EchoLoRALinear

MOST = 0.05
LAST = 5
VOCABULARY, PROMPT, ANSWER = 200, 24, 4


def model(width: int, blocks: int, dora: bool, dtype: torch.dtype, device: str) -> EchoLoRA:
    """The same weights for every backend."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).requires_grad_(False)
    base.to(dtype)
    for name, linear in list(base.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, EchoLoRALinear.from_linear(linear, r=16, use_dora=dora))
    return EchoLoRA(base, EchoConfig(total_steps=1, echo_end_probability=1.0)).to(device).train()


def batches(steps: int, samples: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Random prompts, whose first tokens are the answer."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        prompts = torch.randint(1, VOCABULARY, (samples, PROMPT), generator=draw).tolist()
        features = [{"input_ids": [*ids, *ids[:ANSWER]], "prompt_length": PROMPT} for ids in prompts]
        found.append({name: each.to(device) for name, each in EchoDataCollator(0)(features).items()})
    return found


def losses(options: argparse.Namespace, backend: str, dora: bool) -> list[float]:
    """Of the deployed branch, at every step."""
    os.environ["ECHOLORA_BACKEND"] = backend
    echo = model(options.width, options.blocks, dora, getattr(torch, options.dtype), options.device)
    optimizer = torch.optim.AdamW([p for p in echo.parameters() if p.requires_grad], lr=options.lr)
    found = []
    for batch in batches(options.steps, options.samples, options.device):
        output = echo(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        echo.advance()
        found.append(output.loss_off.detach())
    return torch.stack(found).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    sound = True
    for dora in (False, True):
        curves, seconds = {}, {}
        for backend in (options.backend, "reference"):
            begun = time.perf_counter()
            curves[backend] = losses(options, backend, dora)
            seconds[backend] = time.perf_counter() - begun
        ends = {backend: sum(curve[-LAST:]) / LAST for backend, curve in curves.items()}
        difference = abs(ends[options.backend] / ends["reference"] - 1)
        fell = ends[options.backend] < curves[options.backend][0]
        right = difference <= MOST and fell
        sound &= right
        print(
            f"{'ok' if right else 'FAILED'}  echo-{'dora' if dora else 'lora'} {options.dtype}: {options.backend} "
            + f"{curves[options.backend][0]:.3f} to {ends[options.backend]:.4f} nats, reference {ends['reference']:.4f}, "
            + f"difference {difference:.2%}; {seconds[options.backend]:.1f} s, reference {seconds['reference']:.1f} s",
            flush=True,
        )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
