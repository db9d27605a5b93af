"""Echo-LoRA in PyTorch alone: a hand-written model, and a training step spelled out. Runs in seconds on a CPU.

python examples/plain_pytorch.py

Needs torch and this package, neither PEFT nor transformers. `EchoLoRA(model, config)` does what is spelled out here for
a model whose forward returns logits.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F

from echolora_kernels import Echo, EchoLoRALinear, EchoNetworks
from echolora_kernels.losses import echo_distillation

WIDTH, HEADS, DEPTH, VOCABULARY, STEPS = 64, 4, 8, 100, 20
SOURCES, TARGETS = (6,), (1, 2)  # blocks: deep ones are read, shallow ones receive the echo


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, echo=None):
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        up = self.up(self.norm_2(x)) if echo is None else self.up(self.norm_2(x), echo)
        return x + self.down(F.gelu(up))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(DEPTH)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, echoes=None):
        """Logits [N, T, V], and the mean of the source blocks' outputs [N, T, d]."""
        x, states = self.embedding(input_ids), []
        for index, block in enumerate(self.blocks):
            x = block(x, (echoes or {}).get(f"{index}.up"))
            if index in SOURCES:
                states.append(x)
        return self.head(self.norm(x)), torch.stack(states).mean(0)


torch.manual_seed(0)
model = Model().requires_grad_(False)
for block in model.blocks:
    block.up = EchoLoRALinear.from_linear(block.up, r=8, lora_alpha=16)
networks = EchoNetworks(WIDTH, {f"{index}.up": 4 * WIDTH for index in TARGETS})
optimizer = torch.optim.AdamW([p for p in (*model.parameters(), *networks.parameters()) if p.requires_grad], lr=1e-2)

input_ids = torch.randint(VOCABULARY, (4, 20))
labels = input_ids.clone()
labels[:, :15] = -100  # the prompt is not supervised
answer = labels != -100
boundary = answer.int().argmax(dim=1) - 1  # the last prompt token
draw = random.Random(0)

for step in range(STEPS):
    logits_off, states = model(input_ids)
    logits_on, routed = None, draw.random() < 1.0 - 0.8 * step / STEPS
    if routed:
        z = states[torch.arange(len(states)), boundary].detach()
        deltas = networks(F.layer_norm(z, (WIDTH,)))
        logits_on, _ = model(input_ids, {name: Echo(delta, answer) for name, delta in deltas.items()})
    losses = echo_distillation(logits_off, logits_on, labels)
    losses.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss off {losses.loss_off:.3f}, on {losses.loss_on:.3f}" if routed else
          f"step {step}: loss off {losses.loss_off:.3f}")  # fmt: skip

with torch.no_grad():  # the networks are thrown away, and the adapters merged into ordinary linears
    adapted, _ = model(input_ids)
    for block in model.blocks:
        block.up = block.up.merged_linear()
    print(f"merged: logits differ by at most {(model(input_ids)[0] - adapted).abs().max():.1e}")
