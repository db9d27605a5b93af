"""The rules that pick launch configs: pure functions, checked anywhere."""

import itertools

import pytest
import torch

from echolora_kernels.ops.echo_lora_linear import configs
from echolora_kernels.ops.echo_lora_linear.configs import Device
from echolora_kernels.ops.echo_lora_linear.launch import input_precision

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
H100 = Device("sm_90", 132)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_is_a_listed_candidate(arch, dtype):
    device = Device(arch, 100)
    for rows, cols in itertools.product((0, 1, 63, 4096, 100_000), (1, 1000, 16384)):
        for load in ("plain", "rich", "twin", "added plain", "added rich", "added input plain", "added input rich"):
            listed = configs.candidates("matmul", dtype, arch)
            tile = configs.matmul_tile(rows, cols, dtype, device, load)
            assert tile in [listed[name] for name in configs.matmul_tiles(load) if name in listed]
    for block in (16, 32, 64, 128, 256):
        assert configs.shrink_tile(block, dtype, arch) in configs.candidates("shrink", dtype, arch).values()
        assert configs.adapter_bwd_tile(block, dtype, arch) in configs.candidates("adapter_bwd", dtype, arch).values()
        assert configs.lora_a_bwd_tile(block, dtype, arch) in configs.candidates("lora_a_bwd", dtype, arch).values()


def test_large_products_get_large_tiles():
    names = {tile: name for name, tile in configs.TILES["matmul", "half"].items()}
    pick = lambda rows, cols, load="plain": names[configs.matmul_tile(rows, cols, torch.bfloat16, H100, load)]  # noqa: E731
    assert pick(8192, 4096) == "wide"
    assert pick(8192, 4096, "rich") == "large"
    assert pick(8192, 4096, "twin") == "twin"
    assert pick(128, 4096) == "small" and pick(128, 4096, "twin") == "twin"
    assert names[configs.matmul_tile(8192, 4096, torch.bfloat16, Device("sm_86", 84))] == "lean"


def test_ranks_are_padded_to_powers_of_two():
    assert [configs.rank_block(r) for r in (1, 16, 17, 33, 128, 129, 256)] == [16, 16, 32, 64, 128, 256, 256]
    assert [configs.rank_step(r) for r in (1, 64, 65, 256)] == [16, 64, 64, 64]
    assert [configs.rank_step(r, torch.float32) for r in (1, 64, 256)] == [16, 32, 32]


@pytest.mark.parametrize("rows", [1, 100, 8192, 200_000])
@pytest.mark.parametrize("width", [1, 100, 4096, 14336])
def test_splits_cover_everything_in_whole_steps(rows, width):
    tile = configs.shrink_tile(16, torch.bfloat16, "sm_90")
    splits = configs.shrink_splits(tile, rows, width, 132)
    part = configs.per_split(width, tile.inner, splits)
    assert part % tile.inner == 0 and part * splits >= width and splits <= 264
    tile = configs.dora_norm_tile(torch.bfloat16, "sm_90")
    splits = configs.dora_norm_splits(tile, rows, width, 132)
    part = configs.per_split(width, tile.inner, splits)
    assert part % tile.inner == 0 and part * splits >= width and splits <= configs.MAX_NORM_SPLITS
    splits = configs.reduction_splits(width, rows, 132)
    part = configs.per_split(rows, 1, splits)
    assert part * splits >= rows


def test_blocks_suit_the_dropout_generator():
    for (kernel, _), tiles in configs.TILES.items():
        for tile in tiles.values():
            assert tile.inner % 4 == 0 and tile.cols % 4 == 0, kernel


def test_float32_is_multiplied_as_torch_is_set_to():
    """By whichever of torch's switches, which do not all know of each other."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert input_precision(torch.float32) == expected
            assert input_precision(torch.bfloat16) == input_precision(torch.float64) == "ieee"
        matmul.fp32_precision = "ieee"  # where the older switch still says "medium"
        assert input_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # where the older one can no longer be asked
        assert input_precision(torch.float32) == "tf32"
        matmul.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        assert input_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision, matmul.fp32_precision = before


def test_behind_the_vendors_gemm_an_h100_takes_what_was_measured():
    pick = lambda load, device: configs.matmul_tile(8192, 4096, torch.bfloat16, device, load)  # noqa: E731
    tiles = configs.TILES["matmul", "half"]
    assert pick(configs.forward_load(False, False, added=True), H100) == tiles["flat"]
    assert pick(configs.input_load(16, False, added=True), H100) == tiles["large"]
    assert pick("added plain", Device("sm_80", 108)) == tiles["large"]
