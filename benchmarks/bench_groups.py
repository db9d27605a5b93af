"""Milliseconds forward and backward of the projections of one input: PEFT's, ours one by one, ours in a group.

    python benchmarks/bench_groups.py [--rows 1024] [--dora]

q, k and v and gate and up of SmolLM2-135M's shapes. The three take turns in one process; medians. Outputs and gradients
are first compared with PEFT's in float64. `--no-grad` times the forward pass alone, as in generation.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from echolora_kernels import fuse
from echolora_kernels.integrations.grouped import ungroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(576, width, bias=False) for width in (576, 192, 192))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(576, 1536, bias=False) for _ in range(2))

    def forward(self, x):
        return self.gate_proj(x), self.up_proj(x)


def forms_of(parent: type[nn.Module], dtype: torch.dtype, adapter_dtype: torch.dtype, rank: int, dora: bool) -> dict:
    """The same model three times."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=r".*_proj")
    stock = get_peft_model(nn.Sequential(parent()), config).to(dtype)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    forms = {"PEFT": stock, "one by one": copy.deepcopy(stock), "grouped": copy.deepcopy(stock)}
    for name in ("one by one", "grouped"):
        assert len(fuse(forms[name], strict=True).grouped) == 1
    for module in forms["one by one"].modules():
        ungroup(module)
    return forms


def run(model: nn.Module, x: torch.Tensor, dys: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Outputs, and the gradients where `dys` are given."""
    if dys is None:
        with torch.no_grad():
            return list(model(x))
    ys = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [*ys, *torch.autograd.grad(ys, [x, *parameters], dys)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--no-grad", action="store_true", help="the forward pass alone")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="that of the thread: for one thread on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    for parent in (Attention, Gate):
        for dtype, adapter_dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
            forms = forms_of(parent, DTYPES[dtype], DTYPES[adapter_dtype], arguments.rank, arguments.dora)
            x = torch.randn(1, arguments.rows, 576)
            dys = None if arguments.no_grad else [torch.randn_like(y) for y in parent()(x)]
            exact = run(copy.deepcopy(forms["PEFT"]).double(), *_cast(x, dys, torch.float64))
            x, dys = _cast(x, dys, DTYPES[dtype])
            errors = {}
            for name, model in forms.items():
                errors[name] = [(a - b).abs().max() for a, b in zip(run(model, x, dys), exact, strict=True)]
            floor = [torch.finfo(DTYPES[dtype]).eps * value.abs().max() for value in exact]
            for name in ("one by one", "grouped"):
                pairs = zip(errors[name], errors["PEFT"], floor, strict=True)
                assert all(ours <= 3 * torch.maximum(theirs, least) for ours, theirs, least in pairs)
            seconds: dict[str, list[float]] = {name: [] for name in forms}
            for _ in range(arguments.rounds):
                for name, model in forms.items():
                    started = clock()
                    run(model, x, dys)
                    seconds[name].append(clock() - started)
            medians = "  ".join(f"{name} {1e3 * statistics.median(times):8.3f}" for name, times in seconds.items())
            print(f"{parent.__name__:10} {dtype}, adapters {adapter_dtype}: {medians}", flush=True)


def _cast(x: torch.Tensor, dys: list[torch.Tensor] | None, dtype: torch.dtype):
    return x.to(dtype).requires_grad_(dys is not None), None if dys is None else [dy.to(dtype) for dy in dys]


if __name__ == "__main__":
    main()
