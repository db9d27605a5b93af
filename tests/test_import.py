"""The core needs torch alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "transformers peft triton numpy safetensors accelerate gguf matplotlib rich typer reasoning_gym hypothesis"

PROGRAM = """
import sys

class Absent:
    names = {extras!r}.split()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{body}
assert not set({extras!r}.split()) & set(sys.modules)
"""

CORE = "import echolora_kernels as e; assert set(e.__all__) <= set(dir(e))"
LAYERS = """
import torch, echolora_kernels as e
layer = e.EchoLoRALinear(4, 3, r=2, use_dora=True)
echo = e.Echo(e.EchoNetworks(5, {"a": 3})(torch.ones(1, 5))["a"], torch.ones(1, 2))
logits = layer(torch.ones(1, 2, 4), echo)
e.losses.echo_distillation(logits, logits, torch.tensor([[-100, 1]])).loss.backward()
assert layer.lora_B.grad is not None
"""
METHOD = """
import torch, echolora_kernels as e
from echolora_kernels.integrations.adapters import adapted_linears
assert len(adapted_linears(torch.nn.Sequential(e.EchoLoRALinear(4, 3, r=2)))) == 1
"""
# what a backend without Triton builds on
KERNELS = """
from echolora_kernels.ops.echo_lora_linear import autograd, group, kernels, operators
"""
# the benchmarks' own command line, which says what it has to do without
BENCHMARKS = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in sys.meta_path[0].names else find_spec(name)
from echolora_kernels.benchmarks import command, rates
command.rates.measure = lambda *_: rates.Rates(10.0, {"fp32": 0.1})
flags = "--shape 24x40x32 --method lora --rank 8 --dropout 0 --echo off --dtype fp32 --rounds 1 --warm --device cpu"
assert command.main(flags.split()) == 0
"""
BODIES = {"import": CORE, "layers": LAYERS, "method": METHOD, "kernels": KERNELS, "benchmarks": BENCHMARKS}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_needs_torch_alone(body):
    program = PROGRAM.format(extras=EXTRAS, body=body)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
