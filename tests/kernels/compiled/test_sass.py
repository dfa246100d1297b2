"""Parsing of machine code: a listing by hand, and two small kernels with known code."""

# Kernel bodies are written in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false

import os

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from kernels.compiled.sass import compiled, parse

LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   IGMMA.64x16x32.S8.S8 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   FADD R1, R1, R1 ;
        /*0070*/                   FADD R1, R1, R1 ;
        /*0080*/             @!UP0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_the_loop_is_the_innermost_with_products() -> None:
    instructions, loop = parse(LISTING)
    assert len(instructions) == 11 and instructions[1].startswith("LDG.E.128 R4")
    assert loop == ("IGMMA.64x16x32.S8.S8 R24, R4, gdesc[UR8], R24, gsb0", "BRA `(.L_x_1)")


def test_without_products_it_is_the_longest() -> None:
    assert len(parse(LISTING.replace("IGMMA", "IADD3"))[1]) == 4
    assert parse("        /*0000*/  EXIT ;") == (("EXIT",), ())


@triton.jit
def product_kernel(
    a_ptr: tl.tensor, b_ptr: tl.tensor, c_ptr: tl.tensor, K: tl.tensor, M: tl.constexpr, N: tl.constexpr
) -> None:
    """a: i8[M, K], b: i8[N, K] -> c: i32[M, N]."""
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    total = tl.zeros((M, N), tl.int32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + row[:, None] * K + start + inner[None, :])
        b = tl.load(b_ptr + column[None, :] * K + start + inner[:, None])
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    tl.store(c_ptr + row[:, None] * N + column[None, :], total)


SIGNATURE = {"a_ptr": "*i8", "b_ptr": "*i8", "c_ptr": "*i32", "K": "i32:16"}


@pytest.mark.parametrize(("arch", "opcode", "in_loop"), [(80, "IMMA", 16), (90, "IGMMA", 2)])
def test_counts_of_a_product(arch: int, opcode: str, in_loop: int) -> None:
    code = compiled(product_kernel, SIGNATURE, {"M": 64, "N": 64}, arch, warps=4)
    assert code.loop_count(opcode) == in_loop <= code.count(opcode)
    assert code.count("HMMA") == code.count("HGMMA") == 0
    assert code.spills == code.local == 0
    # At least two stages of two tiles of 64 x 64 bytes.
    assert code.shared >= 2 * 2 * 64 * 64
    assert 24 < code.registers < 200 and "s32.s8.s8" in code.ptx


def test_spills_are_seen() -> None:
    code = compiled(product_kernel, SIGNATURE, {"M": 256, "N": 256}, 80, warps=4)
    assert code.spills > 0 and code.local > 0 and code.registers == 255
