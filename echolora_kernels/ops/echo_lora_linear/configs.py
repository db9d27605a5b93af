"""Launch configs of the Triton kernels: every tile that can ever be picked is in `TILES`, and the rules that pick.

Nothing here touches a device: each choice is a pure function of shapes, dtype, architecture and processor count, so
that it can be tested anywhere and every config can be compiled ahead for every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# row tiles that walk the column tiles together, for the sake of the L2 cache
GROUP = 8
# the rank enters the matmul kernels in steps of at most this many columns
MAX_RANK_STEP = 64
MAX_RANK = 256
# above this rank, partial sums of dS would take longer than a second read of dY (measured on an H100)
ONE_PASS_RANK = 32
# small layers: one program adds up all rows, every program a whole rank
SMALL_ROWS, SMALL_RANK = 2048, 32
# with several launches: rows from which on F1 has enough programs without splits, and how long both products may take
# (`candidates.brief`)
FEW_LAUNCHES_ROWS, FEW_LAUNCHES = 512, 32
# the rank enters D0, where each float32 operand is held as two, in smaller steps
MAX_NORM_RANK_STEP = 32
# programs that share one row's norm in D0, whose partial sums one block holds
MAX_NORM_SPLITS = 16


@dataclass(frozen=True)
class Tile:
    """How one launch cuts its work: an output tile [rows, cols], contracted `inner` at a time.

    Kernels whose output is as wide as the rank leave one side at 0. The programs of a persistent launch are as many as
    the device has processors, and go through the tiles.
    """

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    persistent: bool = False


@dataclass(frozen=True)
class Device:
    """What the rules need to know about a device: architecture ("sm_90", "gfx942", "cpu") and processor count."""

    arch: str
    processors: int


def dtype_class(dtype: torch.dtype) -> str:
    """ "half", "single" or "double": what sizes a tile."""
    return {1: "half", 2: "half", 4: "single", 8: "double"}[dtype.itemsize]


# (kernel, dtype class) -> tiles, each rule's choices in one place; see `candidates`.
TILES: dict[tuple[str, str], dict[str, Tile]] = {
    ("matmul", "half"): {
        "wide": Tile(128, 256, 64, 8, 3),
        "large": Tile(128, 128, 64, 8, 3),
        "lean": Tile(128, 128, 32, 8, 3),
        "twin": Tile(128, 64, 32, 8, 3),
        "small": Tile(64, 64, 64, 4, 3),
        "flat": Tile(64, 128, 16, 8, 1),
        "flat on sm_120": Tile(64, 128, 16, 4, 1),
    },
    ("matmul", "single"): {"twin": Tile(64, 32, 16, 8, 2), "small": Tile(64, 64, 32, 8, 2)},
    ("matmul", "double"): {"twin": Tile(32, 32, 16, 4, 1), "small": Tile(32, 32, 16, 4, 1)},
    # through tensor descriptors
    ("descriptor", "half"): {
        "wide": Tile(128, 256, 64, 8, 3, persistent=True),
        "large": Tile(128, 128, 64, 8, 3, persistent=True),
        "small": Tile(64, 128, 64, 4, 4, persistent=True),
        "pair": Tile(128, 128, 64, 4, 3),
    },
    ("descriptor", "single"): {"small": Tile(64, 64, 32, 8, 2, persistent=True)},
    ("descriptor", "double"): {"small": Tile(32, 32, 16, 4, 1, persistent=True)},
    ("shrink", "half"): {
        "slim": Tile(32, 0, 128, 4, 4),
        "thin": Tile(64, 0, 64, 4, 4),
        "thick": Tile(64, 0, 32, 8, 2),
        "thick on sm_120": Tile(32, 0, 64, 8, 2),  # the taller one spills there, and there is no HGMMA to need it
    },
    ("shrink", "single"): {"thin": Tile(32, 0, 32, 4, 2), "thick": Tile(32, 0, 16, 8, 1)},
    ("shrink", "double"): {"thin": Tile(16, 0, 16, 4, 1), "thick": Tile(16, 0, 16, 4, 1)},
    ("adapter_bwd", "half"): {
        "thin": Tile(256, 0, 32, 8, 3),
        "thin with z": Tile(128, 0, 32, 8, 3),
        "thick": Tile(64, 0, 32, 8, 2),
    },
    ("adapter_bwd", "single"): {"thin": Tile(32, 0, 16, 8, 2), "thick": Tile(16, 0, 16, 8, 1)},
    ("adapter_bwd", "double"): {"thin": Tile(16, 0, 16, 4, 1), "thick": Tile(16, 0, 16, 4, 1)},
    ("lora_a_bwd", "half"): {"thin": Tile(0, 128, 64, 8, 3), "thick": Tile(0, 64, 32, 8, 2)},
    ("lora_a_bwd", "single"): {"thin": Tile(0, 32, 32, 4, 2), "thick": Tile(0, 32, 16, 8, 1)},
    ("lora_a_bwd", "double"): {"thin": Tile(0, 16, 16, 4, 1), "thick": Tile(0, 16, 16, 4, 1)},
    ("small", "half"): {"square": Tile(64, 64, 64, 4, 3)},
    ("small", "single"): {"square": Tile(64, 64, 32, 8, 2)},
    ("small", "double"): {"square": Tile(32, 32, 16, 4, 1)},
    ("small_sum", "half"): {"thin": Tile(0, 64, 64, 4, 3)},
    ("small_sum", "single"): {"thin": Tile(0, 32, 32, 4, 2)},
    ("small_sum", "double"): {"thin": Tile(0, 16, 16, 4, 1)},
    ("dora_norm", "half"): {"thin": Tile(64, 0, 64, 4, 3)},
    ("dora_norm", "single"): {"thin": Tile(64, 0, 64, 4, 3)},
    ("dora_norm", "double"): {"thin": Tile(16, 0, 16, 4, 1)},
    ("scale", "half"): {"square": Tile(64, 64, 0, 4, 1)},
    ("scale", "single"): {"square": Tile(64, 64, 0, 4, 1)},
    ("scale", "double"): {"square": Tile(32, 32, 0, 4, 1)},
}

# shared memory per block of at least 160 KB: room for the large pipelines
ROOMY = ("sm_80", "sm_90", "sm_100", "sm_103")


def candidates(kernel: str, dtype: torch.dtype, arch: str) -> dict[str, Tile]:
    """Every tile that the rules below can pick for `kernel` on `arch`, by name."""
    tiles = dict(TILES[kernel, dtype_class(dtype)])
    for name in [name for name in tiles if " on " in name]:
        tile = tiles.pop(name)
        if name.endswith(arch):
            tiles[name.partition(" on ")[0]] = tile
    if arch not in ROOMY:
        tiles.pop("large", None)
    else:
        tiles.pop("lean", None)
    if arch not in ("sm_90", "sm_100", "sm_103"):
        tiles.pop("wide", None)
    return tiles


def rank_block(rank: int) -> int:
    """Width of a block that holds a whole rank: a power of two, at least the 16 that matrix units need."""
    return max(16, 1 << (rank - 1).bit_length())


def rank_step(rank: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Width of one step over the rank in the matmul kernels; wider numbers take more registers, so fewer columns."""
    most = MAX_RANK_STEP if dtype_class(dtype) == "half" else MAX_RANK_STEP // 2
    return min(most, rank_block(rank))


def matmul_tile(rows: int, cols: int, dtype: torch.dtype, device: Device, load: str = "plain") -> Tile:
    """Tile of F2 and B3 for an output [rows, cols]: the largest that still gives every processor one.

    F2 behind the vendor's GEMM takes the flat one where that was measured to be the fastest: on an H100.

    Args:
        load: what the kernel keeps in registers, see `forward_load` and `input_load`.
    """
    listed = candidates("matmul", dtype, device.arch)
    if load in ("added plain", "added rich") and "flat" in listed and device.arch == "sm_90":
        return listed["flat"]
    tiles = [listed[name] for name in matmul_tiles(load) if name in listed and name != "flat"]
    for tile in tiles:
        if -(-rows // tile.rows) * -(-cols // tile.cols) >= device.processors:
            return tile
    return tiles[-1]


def forward_load(gain: bool, echo: bool, two_products: bool = False, added: bool = False) -> str:
    """What F2 keeps in registers.

    "plain" is one accumulator; "rich" adds an epilogue with DoRA or an echo, which the "wide" tile would spill; "twin"
    is two accumulators (DoRA with dropout). After "added" the vendor's GEMM computes the product with W0, so that all
    the kernel does is move memory.
    """
    load = "twin" if two_products else "rich" if gain or echo else "plain"
    return f"added {load}" if added else load


def input_load(rank: int, dropout: bool, two_products: bool = False, added: bool = False) -> str:
    """The same for B3, where the dropout mask of several rank steps no longer fits beside the "wide" accumulator."""
    thick = dropout and rank > MAX_RANK_STEP
    load = "twin" if two_products else "rich" if thick else "plain"
    return f"added input {load}" if added else load


def matmul_tiles(load: str) -> tuple[str, ...]:
    """Names of the tiles that a matmul kernel with this load may use, in the order of the rule."""
    loads = {
        "plain": ("wide", "large", "lean", "small"),
        "rich": ("large", "lean", "small"),
        "twin": ("twin",),
        "added plain": ("large", "lean", "small", "flat"),
        "added rich": ("small", "flat"),
        "added input plain": ("large", "lean", "small", "flat"),
        "added input rich": ("small", "flat"),
    }
    return loads[load]


def descriptor_tile(rows: int, cols: int, rank: int, dtype: torch.dtype, device: Device, rich: bool) -> Tile:
    """Tile of the descriptor versions of F2 and B3, as `matmul_tile`."""
    tiles = candidates("descriptor", dtype, device.arch)
    for name in descriptor_tiles(rank, rich):
        tile = tiles.get(name)
        if tile and tile.persistent and -(-rows // tile.rows) * -(-cols // tile.cols) >= device.processors:
            return tile
    return tiles["small"]


def descriptor_tiles(rank: int, rich: bool) -> tuple[str, ...]:
    """Names of the tiles that a descriptor kernel may use, largest first.

    The wide one is for thin adapters without a rich epilogue: others would spill or exceed the shared memory.
    """
    return ("large", "small", "pair") if rich or rank > 16 else ("wide", "large", "small", "pair")


def named(tile: str | None, kernel: str, allowed: tuple[str, ...], dtype: torch.dtype, arch: str) -> Tile | None:
    """The tile that "KERNEL/NAME" names, where it is one of `kernel`'s that are `allowed` on `arch`; else None."""
    of, _, name = (tile or "").partition("/")
    return candidates(kernel, dtype, arch).get(name) if of == kernel and name in allowed else None


def uses_descriptors(rank: int, dtype: torch.dtype, arch: str) -> bool:
    """Whether the fused products go through tensor descriptors: Hopper and newer, 16-bit, one step over the rank.

    With more steps Triton 3.7.1 compiles some of these tiles for sm_100 to an empty kernel.
    """
    return dtype_class(dtype) == "half" and arch in ("sm_90", "sm_100", "sm_103") and rank <= MAX_RANK_STEP


def shrink_tile(block_r: int, dtype: torch.dtype, arch: str) -> Tile:
    """Tile of F1 for a padded rank."""
    if block_r <= 16 and "slim" in (tiles := candidates("shrink", dtype, arch)):
        return tiles["slim"]
    return _by_rank("shrink", block_r, dtype, arch)


def adapter_bwd_tile(block_r: int, dtype: torch.dtype, arch: str, with_z: bool = False) -> Tile:
    """Tile of B1 for a padded rank: `rows` outputs, `inner` rows of dY at a time; where z is read too, a lighter one."""
    lighter = candidates("adapter_bwd", dtype, arch).get("thin with z") if with_z and block_r <= 64 else None
    return lighter or _by_rank("adapter_bwd", block_r, dtype, arch)


def lora_a_bwd_tile(block_r: int, dtype: torch.dtype, arch: str) -> Tile:
    """Tile of B2 for a padded rank: `cols` inputs, `inner` rows of x at a time."""
    return _by_rank("lora_a_bwd", block_r, dtype, arch)


def small_tile(dtype: torch.dtype, arch: str) -> Tile:
    """Tile of both large products of a small layer."""
    return candidates("small", dtype, arch)["square"]


def small_sum_tile(dtype: torch.dtype, arch: str) -> Tile:
    """Tile of dB and dA of a small layer: `cols` outputs or inputs, `inner` rows at a time."""
    return candidates("small_sum", dtype, arch)["thin"]


def dora_norm_tile(dtype: torch.dtype, arch: str) -> Tile:
    """Tile of D0: `rows` outputs, `inner` inputs at a time."""
    return candidates("dora_norm", dtype, arch)["thin"]


def scale_tile(dtype: torch.dtype, arch: str) -> Tile:
    """Tile of the product of a matrix and a factor per row: square, so that either side may be the contiguous one."""
    return candidates("scale", dtype, arch)["square"]


def _by_rank(kernel: str, block_r: int, dtype: torch.dtype, arch: str) -> Tile:
    return candidates(kernel, dtype, arch)["thin" if block_r <= 64 else "thick"]


def shrink_splits(tile: Tile, rows: int, width: int, processors: int) -> int:
    """Programs that share one row's contraction in F1: where row tiles leave half of the device idle, with 8 steps each.

    Adding up what they found is a launch of its own.
    """
    row_tiles = max(1, -(-rows // tile.rows))
    return max(1, min(processors // (2 * row_tiles), width // (8 * tile.inner)))


def dora_norm_splits(tile: Tile, rows: int, width: int, processors: int) -> int:
    """Programs that share one row's norm in D0: four a processor, each with at least 4 steps; `MAX_NORM_SPLITS`."""
    row_tiles = max(1, -(-rows // tile.rows))
    return max(1, min(4 * processors // row_tiles, width // (4 * tile.inner), MAX_NORM_SPLITS))


def reduction_splits(n_tiles: int, steps: int, processors: int) -> int:
    """Programs that share one output tile's sum over `steps` row blocks in B1 and B2."""
    return max(1, min(2 * processors // max(1, n_tiles), -(-steps // 4)))


def per_split(length: int, step: int, splits: int) -> int:
    """How much of `length` each of `splits` programs takes: a multiple of `step`, so that blocks never straddle."""
    return max(1, -(-length // (step * splits))) * step
