"""The machine code of linear_w4a16's kernel: products from registers, cheap nibble-to-float conversion, no spills."""

import os

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.linear_int.tuning import Tile, with_split
from qpcompile.kernels.linear_w4a16.triton import PLANE, SHAPES, linear_w4a16_kernel


def linear(tile: Tile, half: str, groups: int = 1, arch: int = 90) -> Compiled:
    """The kernel for K = 4096 with a bias."""
    signature = {"w_ptr": "*i8", "x_ptr": half, "w_scale_ptr": "*fp32", "bias_ptr": half, "y_ptr": half}
    signature |= {"partial_ptr": "*fp32", "arrived_ptr": "*i32", "T": "i32", "N": "i32:16"}
    constants = {"K": 4096, "GW": groups, "PLANE": PLANE, "HAS_BIAS": True, "OUT": tile.out, "TOKENS": tile.tokens}
    constants |= {"STEP": tile.step, "SPLIT": tile.split}
    return compiled(linear_w4a16_kernel, signature, constants, arch, tile.warps, tile.stages)


@pytest.mark.parametrize(
    ("tokens", "half", "groups", "instructions"),
    [
        (16, "*bf16", 1, 330),
        (2048, "*bf16", 1, 345),
        pytest.param(16, "*fp16", 1, 265, marks=pytest.mark.slow),
        pytest.param(16, "*bf16", 32, 350, marks=pytest.mark.slow),
    ],
)
def test_hopper(tokens: int, half: str, groups: int, instructions: int) -> None:
    tile = with_split(SHAPES[tokens], 132, 4096, 4096, tokens)
    code = linear(tile, half, groups)
    # Each group of four warps multiplies 64 rows; 16 columns per instruction, and both planes.
    rows_of_a_group = tile.out * 4 // tile.warps // 64
    assert code.loop_count("HGMMA") == rows_of_a_group * 2 * tile.step // 16
    assert code.loop_count("I2F") == code.loop_count("STS") == code.spills == 0
    assert len(code.loop) <= 1.1 * instructions
    assert code.shared <= 227 * 1024


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch: int) -> None:
    code = linear(SHAPES[16], "*bf16", arch=arch)
    assert code.count({80: "HMMA", 100: "UTCHMMA"}[arch]) > 0
