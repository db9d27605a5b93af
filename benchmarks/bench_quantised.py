"""Forward + backward of one LoRA linear on a 4-bit base of bitsandbytes: PEFT's layer, and the same one fused.

    python benchmarks/bench_quantised.py [--shapes MxKxN ...] [--dtype bfloat16] [--rank 16] [--rounds 30]

Both run in one process, in turn, and medians are compared, also with the base layer alone. Each is first checked
against float64; one that is wrong gets no time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from echolora_kernels import fuse
from echolora_kernels.integrations.quantised import dequantised_rows

WARM_UP = 3
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.06}  # of the largest element


def peft_layer(d_in: int, d_out: int, arguments: argparse.Namespace) -> PeftModel:
    """A PEFT model of one NF4 linear with float32 adapters."""
    linear = nn.Linear(d_in, d_out, bias=False)
    base = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, quant_type="nf4")
    base.load_state_dict(linear.state_dict())
    model = nn.Sequential(base.to("cpu"))
    model.is_loaded_in_4bit = True
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=arguments.dropout,
        use_dora=arguments.dora,
        target_modules=["0"],
    )
    adapted = get_peft_model(model, config).train()
    nn.init.normal_(adapted.base_model.model[0].lora_B["default"].weight, 0, 0.02)
    return adapted


def check(layer: nn.Module, x: torch.Tensor) -> None:
    """Raise unless the layer computes x (W0 + s B A)^T; DoRA starts with a gain other than 1, and is not checked."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    weight = torch.cat([*dequantised_rows(layer.base_layer)]).double() + layer.scaling["default"] * b @ a
    wanted = x.double() @ weight.T
    error = (layer.train(False)(x.detach().requires_grad_()) - wanted).abs().max() / wanted.abs().max()
    layer.train()
    assert error < TOLERANCES[x.dtype], f"wrong: error {error:.1e}"


def measure(arguments: argparse.Namespace, shape: str) -> None:
    rows, d_in, d_out = map(int, shape.split("x"))
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    stock = peft_layer(d_in, d_out, arguments)
    fused = copy.deepcopy(stock)
    fuse(fused, strict=True)
    layers = {"peft": stock.base_model.model[0], "fused": fused.base_model.model[0]}
    x = torch.randn(8, rows // 8, d_in).to(dtype).requires_grad_()
    dy = torch.randn(8, rows // 8, d_out).to(dtype)
    if not arguments.dora:
        for layer in layers.values():
            check(layer, x)
    layers["base"] = layers["peft"].base_layer
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(WARM_UP + arguments.rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x).backward(dy)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    base, peft, ours = (statistics.median(times[name]) for name in ("base", "peft", "fused"))
    print(
        f"{shape:>16}  base {1e3 * base:7.2f} ms   PEFT {peft / base:.2f}   fused {ours / base:.2f}   "
        f"PEFT / fused {peft / ours:.2f}   of the update alone {(peft - base) / (ours - base):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x576x576", "1024x576x1536", "1024x1536x576"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes:
        measure(arguments, shape)


if __name__ == "__main__":
    main()
