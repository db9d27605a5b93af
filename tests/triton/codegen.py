"""Compile the kernels for GPUs that are not here, exactly as their launchers would launch them.

Run as a script, without TRITON_INTERPRET: one JSON line per compiled launch.

    python tests/triton/codegen.py --arch sm_90 --dtype bfloat16 [--kernel linear_fwd_kernel] [--all]
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from echolora_kernels.ops.dora_norm import triton_norm
from echolora_kernels.ops.echo_distillation import triton_losses
from echolora_kernels.ops.echo_lora_linear import (
    configs,
    triton_backward_launch,
    triton_descriptors,
    triton_forward_launch,
    triton_scale,
    triton_small_launch,
)
from echolora_kernels.ops.echo_lora_linear.dropout import Dropout
from echolora_kernels.ops.echo_lora_linear.launch import Launch
from echolora_kernels.ops.echo_networks import triton_launch

SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
TYPES = {
    torch.bool: "*i1",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS, T, WIDTH = 8192, 512, 4096


class Recorder:
    """Stands in for `launch.run` and `Launch.run`, and keeps what they were given."""

    def __init__(self):
        self.launches = []
        for module in (triton_launch, triton_losses):
            module.run = self
        Launch.run = lambda planned, device, **tensors: self(
            planned.kernel, None, device, planned.tile, **planned.arguments(tensors)
        )

    def __call__(self, kernel, grid, device, tile, **arguments):
        self.launches.append((kernel, tile, arguments))


def target(arch):
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def source(kernel, arguments):
    """What the just-in-time compiler would make of these arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        alike = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not alike):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}[{block}]>"
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not alike):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def inspect(compiled):
    """Registers, spills and matrix instructions of a compiled CUDA kernel, and how many products go on from a sum."""
    chained = _chained(compiled.asm["ttgir"])
    if "cubin" not in compiled.asm:
        return {"mfma": len(re.findall(r"v_mfma", compiled.asm["amdgcn"])), "chained": chained}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(BINARIES / "cuobjdump", "-res-usage", file.name)
        sass = _output(BINARIES / "nvdisasm", "-c", file.name)
    count = {
        name: len(re.findall(rf"\b{name}\b", sass))
        for name in ("HGMMA", "HMMA", "LDL", "STL", "UTCHMMA", "UTMALDG", "UTMASTG")
    }
    registers = re.search(r"REG:(\d+)", usage)
    return {"registers": int(registers.group(1)) if registers else None, "chained": chained, **count}


def _chained(code):
    """Products that do not start from zero; Hopper's on its matrix units are not among them."""
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0", code))
    return sum(start not in zeros for start in re.findall(r" = tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", code))


def _output(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def launches(arch, dtype, everything):
    """(label, kernel, tile, arguments) for every tile that the rules can pick on `arch`.

    Each comes in its plainest and in its heaviest form; `everything` adds what lies between, and more ranks.
    """
    recorder = Recorder()
    torch.version.hip = "6" if arch.startswith("gfx") else None  # what launchers ask
    meta = {"device": "meta", "dtype": dtype}
    x = torch.empty(ROWS // T, T, WIDTH, **meta)
    weight, vector = torch.empty(WIDTH, WIDTH, **meta), torch.empty(WIDTH, **meta)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gain = torch.empty(WIDTH, device="meta", dtype=wide)
    mask = torch.empty(ROWS // T, T, dtype=torch.bool, device="meta")
    delta = torch.empty(ROWS // T, WIDTH, **meta)
    echo = {"delta": delta, "mask": mask}
    y = torch.empty(ROWS, WIDTH, **meta)
    none, some = Dropout(), Dropout(0.1, torch.empty(1, dtype=torch.int64, device="meta"))
    linear, shrink, dora_norm = triton_forward_launch.linear, triton_forward_launch.shrink, triton_norm.dora_norm
    adapter_backward = triton_backward_launch.adapter_backward
    lora_a_backward = triton_backward_launch.lora_a_backward
    input_backward = triton_backward_launch.input_backward

    def adapters(rank, kind=dtype):
        shrunk = torch.empty(ROWS, rank, **meta)
        a, b = torch.empty(rank, WIDTH, device="meta", dtype=kind), torch.empty(WIDTH, rank, device="meta", dtype=kind)
        return a, b, shrunk

    def record(label, function, *arguments, **options):
        recorder.launches.clear()
        function(*arguments, **options)
        for kernel, tile, values in recorder.launches:
            yield label, kernel, tile, values

    tiles = configs.candidates("matmul", dtype, arch)
    for rank in (16, 256) if everything else (16,):
        a, b, s = adapters(rank)
        for name in tiles:
            where, tile = f"{name} r{rank}", {"tile": tiles[name]}
            if name in configs.matmul_tiles("plain"):
                yield from record(f"{where} lora", linear, x, weight, s, b, bias=vector, dropout=none, **tile)
                if name in configs.matmul_tiles("plain" if rank <= configs.MAX_RANK_STEP else "rich"):
                    yield from record(f"{where} dropout", input_backward, x, weight, s, a, dropout=some, **tile)
                yield from record(f"{where} dora", input_backward, x, weight, s, a, gain=gain, dropout=none, **tile)
                if everything:
                    yield from record(f"{where} lora", input_backward, x, weight, s, a, dropout=none, **tile)
            if name == "small":  # for the other projections of a group
                alone = {"dropout": none, "base": torch.empty(ROWS, WIDTH, **meta), **tile}
                yield from record(f"{where} no adapter", input_backward, x, weight, None, None, **alone)
            heavy = {"gain": gain, "bias": vector, "store_z": True, **echo, **tile}
            if name in configs.matmul_tiles("rich"):
                yield from record(f"{where} dora echo", linear, x, weight, s, b, dropout=none, **heavy)
            if everything or name == "flat":
                if name in configs.matmul_tiles("added rich"):
                    added_heavy = {**heavy, "base": y, "dropout": none}
                    yield from record(f"{where} added dora echo", linear, x, weight, s, b, **added_heavy)
                if name in configs.matmul_tiles(f"added {'plain' if rank <= configs.MAX_RANK_STEP else 'rich'}"):
                    added_dropout = {"dropout": some, "contract": False, **tile}
                    yield from record(f"{where} added dropout", input_backward, x, weight, s, a, **added_dropout)
                if name in configs.matmul_tiles("added plain"):
                    yield from record(f"{where} added", linear, x, weight, s, b, contract=False, dropout=none, **tile)
            if name in configs.matmul_tiles("twin"):
                yield from record(f"{where} dora echo dropout", linear, x, weight, s, b, dropout=some, **heavy)
                yield from record(
                    f"{where} dora dropout", input_backward, x, weight, s, a, gain=gain, dropout=some, **tile
                )
    yield from _by_descriptors(arch, dtype, everything, adapters, record, x, weight, vector, gain, echo, some)
    yield from _losses(everything, record, dtype)
    yield from _small(dtype, adapters, record, x, weight, vector, some)
    for label, matrix in {"rows": weight, "columns": weight.t()}.items():
        yield from record(label, triton_scale.scale_rows, matrix, gain)
    for rank in (16, 32, 64, 128, 256) if everything else (16, 64, 256):
        block = configs.rank_block(rank)
        for kind in sorted({dtype, wide}, key=str) if everything else (wide,):
            a, b, s = adapters(rank, kind)
            where = f"r{rank} {str(kind)[6:]} adapters"
            tile = {"tile": configs.shrink_tile(block, dtype, arch)}
            inner = {"dropout": some, "mask": mask, **tile}
            rank_delta = torch.empty(ROWS // T, rank, **meta)
            yield from record(where, shrink, x, a, 2.0, dropout=none, **tile)
            yield from record(f"{where} echo dropout", shrink, x, a, 2.0, site="adapter_input", delta=delta, **inner)
            if everything:
                yield from record(f"{where} dropout", shrink, x, a, 2.0, dropout=some, **tile)
                yield from record(
                    f"{where} rank echo dropout", shrink, x, a, 2.0, site="rank", delta=rank_delta, **inner
                )
            if rank > configs.ONE_PASS_RANK:
                yield from record(f"{where} gain", shrink, x, b.t(), 2.0, gain=gain, dropout=none, **tile)
            need = {"need_ds": rank <= configs.ONE_PASS_RANK, "need_lora_b": True}
            need |= {"tile": configs.adapter_bwd_tile(block, dtype, arch)}
            yield from record(where, adapter_backward, x, s, b, 2.0, **need)
            need["tile"] = configs.adapter_bwd_tile(block, dtype, arch, with_z=True)
            need |= {"need_bias": True, "need_gain": True, "need_delta": True, "mask": mask, "gain": gain}
            yield from record(f"{where} dora echo", adapter_backward, x, s, b, 2.0, z=x.view(ROWS, WIDTH), **need)
            tile = configs.dora_norm_tile(torch.promote_types(dtype, kind), arch)
            yield from record(where, dora_norm, weight, a, b, 2.0, vector, tile=tile)
        options = {"dtype": dtype, "tile": configs.lora_a_bwd_tile(block, dtype, arch)}
        yield from record(f"r{rank}", lora_a_backward, x, s, dropout=none, **options)
        yield from record(f"r{rank} echo dropout", lora_a_backward, x, s, dropout=some, **echo, **options)
    yield from _networks(dtype, record)


def _networks(dtype, record):
    """Bottlenecks that make different tiles; widths of Llama-3-8B and a rank."""
    for m in (8, 64, 100, 256):
        widths = [4096, 1024, 1024, 4096, 14336, 14336, 16] * 4
        meta = {"device": "meta", "dtype": dtype}
        total, hidden = sum(widths), 2 * len(widths) * m
        matrix, vector = torch.empty(total, m, **meta), torch.empty(total, **meta)
        up = (matrix, matrix, vector, torch.empty(len(widths), **meta), widths)
        u, down = torch.empty(8, WIDTH, **meta), torch.empty(hidden, WIDTH, **meta)
        h = torch.empty(8, hidden, device="meta", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        yield from record(f"m{m}", triton_launch.forward, u, down, *up)
        yield from record(f"m{m}", triton_launch.backward, torch.empty(8 * total, **meta), h, *up)


def _by_descriptors(arch, dtype, everything, adapters, record, x, weight, vector, gain, echo, dropout):
    if not configs.uses_descriptors(16, dtype, arch):
        return
    linear, backward = triton_descriptors.linear_by_descriptors, triton_descriptors.input_by_descriptors
    for rank in (16, 32, 64) if everything else (16, 64):
        a, b, s = adapters(rank)
        for name, tile in configs.candidates("descriptor", dtype, arch).items():
            where = f"{name} r{rank}"
            if name == "wide" and rank > 16:
                continue
            if name != "wide":
                heavy = {"gain": gain, "bias": vector, "store_z": True, **echo}
                yield from record(f"{where} dora echo", linear, x, weight, s, b, tile=tile, **heavy)
                yield from record(f"{where} dropout", backward, x, weight, s, a, dropout=dropout, tile=tile)
            yield from record(f"{where} lora", linear, x, weight, s, b, bias=vector, tile=tile)
            yield from record(f"{where} lora", backward, x, weight, s, a, dropout=Dropout(), tile=tile)


def _small(dtype, adapters, record, x, weight, vector, dropout):
    """Float32 adapters; the plainest form, and the heaviest; of one launch, though the sizes here would have several."""
    triton_small_launch._in_one = lambda *_: True
    forward, backward = triton_small_launch.small_forward, triton_small_launch.small_backward
    for rank in (16, configs.SMALL_RANK):
        a, b, _ = adapters(rank, torch.promote_types(dtype, torch.float32))
        s = torch.empty(ROWS, rank, device="meta", dtype=dtype)
        for label, drop, more in (
            (f"r{rank}", Dropout(), {}),
            (f"r{rank} dropout", dropout, {"base": x.view(-1, WIDTH)}),
        ):
            bias = vector if more else None
            yield from record(label, forward, x, weight, a, b, 2.0, bias=bias, dropout=drop, shape=(ROWS, WIDTH))
            yield from record(label, backward, x, x, weight, s, a, b, 2.0, dropout=drop, **more)


def _losses(everything, record, dtype):
    """Of 128256 tokens, in the plainest and in the heaviest form; and with strides that nothing is known of."""
    odd = [torch.empty(64, 7, 128257, device="meta", dtype=dtype)[..., 1:] for _ in range(2)]
    plain = [torch.empty(64, 7, 128256, device="meta", dtype=dtype) for _ in range(2)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = torch.empty(448, dtype=torch.int64, device="meta")
    stats, scales = (torch.empty(shape, dtype=wide, device="meta") for shape in ((448, 7), (3,)))
    for temperature in (1.0, 2.0, 1.7) if everything else (1.7,):
        for label, (off, on) in {"rows": plain, "odd rows": odd}.items():
            where = f"{label} tau {temperature}"
            yield from record(f"{where} off", triton_losses.forward, off, None, targets, temperature)
            yield from record(where, triton_losses.forward, off, on, targets, temperature)
            arguments = (targets, stats, temperature, scales)
            backward = triton_losses.backward
            yield from record(f"{where} off", backward, off, None, *arguments, (True, False), off, None)
            yield from record(where, backward, off, on, *arguments, (True, True), off, on)


def compile_all(arch, dtype, everything, kernel_name=None):
    """One result for each of `launches`."""
    for label, kernel, tile, arguments in launches(arch, dtype, everything):
        if kernel_name and kernel.fn.__name__ != kernel_name:
            continue
        result = {
            "arch": arch,
            "dtype": str(dtype)[6:],
            "kernel": kernel.fn.__name__,
            "label": label,
            "tile": str(tile),
        }
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
        try:
            compiled = triton.compile(source(kernel, arguments), target=target(arch), options=options)
            result |= {"shared": compiled.metadata.shared, "limit": SHARED_LIMIT[arch], **inspect(compiled)}
        except Exception as error:  # reported, not raised: the caller wants the whole matrix
            result["error"] = f"{type(error).__name__}: {error}"[:400]
        yield result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", required=True, choices=SHARED_LIMIT)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--kernel")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    for result in compile_all(options.arch, getattr(torch, options.dtype), options.all, options.kernel):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
