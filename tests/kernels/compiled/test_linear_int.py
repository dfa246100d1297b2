"""The machine code of linear_int's kernels: int8 products from registers, a cheap unpack, no spills, no GPU needed.

The numbers are for Triton 3.9; a change of a few instructions is acceptable, a jump is not.
"""

import os
import re

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.linear_int.triton import NEIGHBOURS, linear_int_kernel, prepare_activations_kernel, tile_of_two
from qpcompile.kernels.linear_int.triton_grouped import linear_int_grouped_kernel
from qpcompile.kernels.linear_int.tuning import RAW_TOKENS, SHAPES, Tile, start_tile

SCALES = {"scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
SIZES = {"T": "i32", "N": "i32:16"}
SIGNATURE = {"w_ptr": "*i8", "x_ptr": "*i8", "sum_ptr": "*i32", **SCALES, "residual_ptr": "*bf16", "y_ptr": "*bf16"}
SIGNATURE |= {"workspace_ptr": "*i32", **SIZES}
HOPPER_SHARED = 227 * 1024


def linear(tile: Tile, raw: bool, arch: int = 90, residual: bool = False, bits: int = 4) -> Compiled:
    """The kernel for K = 4096 with a bias."""
    constants = {
        "K": 4096,
        "PLANE": 128,
        "RAW": raw,
        "FACTOR": 16 if bits == 4 else 1,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": residual,
    }
    constants |= {"OUT": tile.out, "TOKENS": tile.tokens, "STEP": tile.step, "SPLIT": tile.split}
    constants |= {"NEIGHBOURS": NEIGHBOURS}
    return compiled(linear_int_kernel, SIGNATURE, constants, arch, tile.warps, tile.stages)


@pytest.mark.parametrize(
    ("tokens", "split", "instructions", "products", "registers"),
    [
        (16, 5, 171, 12, 96),
        (64, 5, 195, 12, 255),
        (256, 2, 143, 8, 160),
        (1024, 1, 95, 4, 128),
        (16384, 1, 119, 8, 255),
    ],
)
def test_hopper(tokens: int, split: int, instructions: int, products: int, registers: int) -> None:
    tile = start_tile(132, 4096, 4096, tokens)
    assert tile.split == split
    code = linear(tile, raw=tokens <= RAW_TOKENS)
    # The left operand is registers, not a descriptor of shared memory.
    lefts = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8 \{[^}]*\}, (.)", code.ptx)
    assert lefts and set(lefts) == {"{"}
    assert code.loop_count("IGMMA") == products
    # Two masks per four bytes of weights and nothing else: no permutes, no stores to shared memory.
    masks = 2 * tile.out * tile.step // 4 // (32 * tile.warps)
    assert masks <= code.loop_count("LOP3") <= masks + 4
    assert code.loop_count("PRMT") == code.loop_count("STS") == code.spills == 0
    assert len(code.loop) <= 1.1 * instructions
    assert code.registers <= registers
    assert code.shared == tile.shared <= HOPPER_SHARED
    # Results are stored in 16-byte vectors.
    assert code.count("STG") <= tile.out * tile.tokens // (32 * tile.warps) // 8


@pytest.mark.parametrize(
    ("tokens", "instructions", "products", "registers"), [(256, 154, 8, 180), (1024, 108, 4, 220), (16384, 108, 4, 220)]
)
def test_8_bit_activations(tokens: int, instructions: int, products: int, registers: int) -> None:
    code = linear(tile_of_two(start_tile(132, 4096, 4096, tokens)), raw=False, bits=8)
    # As with 4 bits: masks only, and no more instructions than the second accumulator needs.
    assert code.loop_count("IGMMA") == products
    assert code.loop_count("PRMT") == code.loop_count("STS") == code.spills == 0
    assert len(code.loop) <= 1.1 * instructions and code.registers <= registers


@pytest.mark.parametrize("arch", [80, pytest.param(100, marks=pytest.mark.slow)])
def test_8_bit_activations_on_other_architectures(arch: int) -> None:
    code = linear(tile_of_two(start_tile(108, 4096, 4096, 256)), raw=False, arch=arch, bits=8)
    assert code.count({80: "IMMA", 100: "UTCIMMA"}[arch]) > 0
    assert code.shared <= {80: 163, 100: 227}[arch] * 1024


@pytest.mark.parametrize(("tokens", "instructions", "registers"), [(16, 89, 64), (64, 103, 96), (1024, 69, 160)])
def test_8_bit_weights(tokens: int, instructions: int, registers: int) -> None:
    code = grouped(start_tile(132, 4096, 4096, tokens), groups=1, packed=False)
    assert code.count("IGMMA") > 0 and code.loop_count("PRMT") == code.spills == 0
    assert len(code.loop) <= 1.1 * instructions and code.registers <= registers


def test_residual_costs_registers_but_nothing_in_the_loop() -> None:
    code = linear(SHAPES[1024], raw=False, residual=True)
    assert code.spills == 0 and len(code.loop) <= 1.1 * 95 and code.registers <= 192


def test_split_adds_without_returning() -> None:
    code = linear(start_tile(132, 4096, 4096, 16), raw=True)
    # One atomic addition per accumulator element and thread, without a returned value, and one for the counter.
    assert (code.count("RED") + code.count("REDG"), code.count("ATOM") + code.count("ATOMG")) == (8, 1)


@pytest.mark.parametrize(
    ("tokens", "arch"),
    [
        (16, 80),
        (16, 100),
        pytest.param(1024, 80, marks=pytest.mark.slow),
        pytest.param(1024, 100, marks=pytest.mark.slow),
    ],
)
def test_other_architectures(tokens: int, arch: int) -> None:
    code = linear(start_tile(108, 4096, 4096, tokens), raw=tokens <= RAW_TOKENS, arch=arch)
    assert code.count({80: "IMMA", 100: "UTCIMMA"}[arch]) > 0
    assert code.shared <= {80: 163, 100: 227}[arch] * 1024


def grouped(tile: Tile, groups: int, packed: bool) -> Compiled:
    """The kernel of scales per group, for K = 4096 with a bias."""
    constants = {"K": 4096, "PLANE": 128, "G": groups, "GW": groups, "HAS_BIAS": True, "PACKED": packed}
    constants |= {"OUT": tile.out, "TOKENS": tile.tokens, "STEP": tile.step}
    signature = {"w_ptr": "*i8", "q_ptr": "*i8", **SCALES, "y_ptr": "*bf16", **SIZES}
    return compiled(linear_int_grouped_kernel, signature, constants, 90, tile.warps, tile.stages)


def test_grouped() -> None:
    code = grouped(SHAPES[64], groups=32, packed=True)
    assert code.count("IGMMA") > 0 and code.spills == 0


def test_preparation() -> None:
    signature = {"q_ptr": "*i8", "x_ptr": "*i8", "sum_ptr": "*i32"}
    code = compiled(prepare_activations_kernel, signature, {"K": 4096, "PLANE": 128, "FACTOR": 16, "BLOCK": 2048}, 90)
    assert code.spills == 0 and code.registers <= 64
    assert all("128" in each for each in code.instructions if each.startswith(("LDG", "STG.E.1")))
