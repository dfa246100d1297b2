"""The machine code of linear_w8a16's kernel: products from registers, cheap code-to-float conversion, no spills."""

import os

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.linear_int.tuning import Tile
from qpcompile.kernels.linear_w8a16.triton import SHAPES, linear_w8a16_kernel


def linear(tile: Tile, half: str, arch: int = 90) -> Compiled:
    """The kernel for K = 4096 without a bias."""
    signature = {"w_ptr": "*i8", "x_ptr": half, "w_scale_ptr": "*fp32", "bias_ptr": "*i8", "y_ptr": half}
    signature |= {"T": "i32", "N": "i32:16"}
    constants = {"K": 4096, "HAS_BIAS": False, "OUT": tile.out, "TOKENS": tile.tokens, "STEP": tile.step}
    return compiled(linear_w8a16_kernel, signature, constants, arch, tile.warps, tile.stages)


@pytest.mark.parametrize(
    ("tokens", "half"),
    [(16, "*bf16"), (2048, "*bf16"), pytest.param(16, "*fp16", marks=pytest.mark.slow)],
)
def test_hopper(tokens: int, half: str) -> None:
    tile = SHAPES[tokens]
    code = linear(tile, half)
    # Each group of four warps multiplies 64 rows; 16 columns per instruction.
    rows_of_a_group = tile.out * 4 // tile.warps // 64
    assert code.loop_count("HGMMA") == rows_of_a_group * tile.step // 16
    assert code.loop_count("I2F") == code.loop_count("STS") == code.spills == 0
    assert code.shared <= 227 * 1024


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch: int) -> None:
    code = linear(SHAPES[16], "*bf16", arch=arch)
    assert code.count({80: "HMMA", 100: "UTCHMMA"}[arch]) > 0
