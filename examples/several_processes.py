"""Echo-LoRA in several processes, each with its own samples; the adapter is written once.

torchrun --nproc-per-node 2 examples/several_processes.py [ddp|fsdp2]

Runs in seconds on a CPU. The adapter is written to runs/several_processes_adapter.
"""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from echolora_kernels import EchoConfig, EchoLoRA

dist.init_process_group("gloo")  # "nccl" on GPUs, where everything below goes to the GPU of LOCAL_RANK
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same initial values everywhere
base = LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
)
echo = EchoLoRA(
    get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), EchoConfig(total_steps=10)
).train()

if "fsdp2" in sys.argv:
    for block in base.model.layers:
        fully_shard(block)
    model = fully_shard(echo)
else:  # on steps that are not routed the echo networks have no gradient
    model = DistributedDataParallel(echo, find_unused_parameters=True)
optimizer = torch.optim.AdamW([p for p in echo.parameters() if p.requires_grad], lr=1e-3)

torch.manual_seed(1 + rank)  # from here on each process has its own samples
for step in range(10):
    input_ids = torch.randint(100, (4, 20))
    labels = input_ids.clone()
    labels[:, : 15 - rank] = -100  # mask the prompt
    items = (labels[:, 1:] != -100).sum()
    dist.all_reduce(items)  # supervised tokens of all processes
    output = model(input_ids, labels=labels, num_items_in_batch=items)
    (output.loss * processes).backward()  # the wrappers average over the processes
    optimizer.step()
    optimizer.zero_grad()
    echo.advance()
    loss = output.loss.detach()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"step {step}: loss {loss:.3f}, {'routed' if output.routed else 'plain'}")

plain = echo.remove()
whole = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    plain.save_pretrained("runs/several_processes_adapter", state_dict=whole)
dist.destroy_process_group()
