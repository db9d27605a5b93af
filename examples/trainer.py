"""Echo-LoRA in transformers' Trainer: a small random Llama, PEFT adapters, ten steps. Runs in seconds on a CPU.

python examples/trainer.py

Checkpoints are written to runs/trainer, the adapter to runs/trainer_adapter.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from echolora_kernels import EchoConfig, EchoDataCollator, EchoLoRA
from echolora_kernels.integrations.trainer import EchoTrainer

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))
samples = [{"input_ids": torch.randint(1, 100, (20,)).tolist(), "prompt_length": 15} for _ in range(32)]

trainer = EchoTrainer(
    model=EchoLoRA(model, EchoConfig(total_steps=10)),
    args=TrainingArguments(
        "runs/trainer",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=2,
        eval_strategy="epoch",  # of the plain model
        save_steps=5,
        report_to=[],
        remove_unused_columns=False,  # the collator reads prompt_length
    ),
    train_dataset=samples[4:],
    eval_dataset=samples[:4],
    data_collator=EchoDataCollator(pad_token_id=0),
)
trainer.train()  # resume_from_checkpoint=True goes on exactly where the last checkpoint was
trainer.save_model("runs/trainer_adapter")  # an ordinary PEFT adapter
