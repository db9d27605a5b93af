"""Echo-LoRA in a training loop of your own: a small random Llama, PEFT adapters, ten steps. Runs in seconds on a CPU.

python examples/plain_loop.py

The adapter is written to runs/plain_loop_adapter.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from echolora_kernels import EchoConfig, EchoLoRA

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))
echo = EchoLoRA(model, EchoConfig(total_steps=10)).train()
optimizer = torch.optim.AdamW([p for p in echo.parameters() if p.requires_grad], lr=1e-2)

input_ids = torch.randint(100, (4, 20))
labels = input_ids.clone()
labels[:, :15] = -100  # the prompt is not supervised; the echo is read at its last token

for step in range(10):
    output = echo(input_ids, labels=labels)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    echo.advance()  # one optimizer step of the routing schedule
    on = "-" if output.loss_on is None else f"{output.loss_on:.3f}"
    print(f"step {step}: loss off {output.loss_off:.3f}, on {on}")

plain = echo.remove()  # the echo path is gone; what is left is an ordinary PEFT model
plain.save_pretrained("runs/plain_loop_adapter")
