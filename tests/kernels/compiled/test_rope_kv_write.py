"""The machine code of rope_kv_write at the head sizes of 7B models: halves of heads stay in registers."""

import os

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.hadamard.triton import norm_of, odd_factor
from qpcompile.kernels.rope_kv_write.triton import rope_kv_kernel, tiling_of

POINTERS = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "y")} | {"inner_ptr": "*fp32", "center_ptr": "*bf16"}
POINTERS |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "k_codes_ptr": "*u8", "v_codes_ptr": "*u8"}
POINTERS |= {"k_affine_ptr": "*fp32", "v_affine_ptr": "*fp32"}
COUNTS = ("B", "H", "G", "S", "start", "slots")


def code_of(size: int, rotate: bool, arch: int, one_token: bool = False, bits: tuple[int, int] = (4, 4)) -> Compiled:
    tiling = tiling_of(size, rotate)
    assert tiling is not None
    constants = dict(zip(("HALF", "TOKENS", "OUTER", "MIDDLE", "INNER", "PAD"), tiling.shape, strict=True))
    constants |= {"norm": norm_of(size), "ODD": odd_factor(size), "TABLES": True, "ROTATE": rotate, "CENTER": True}
    constants |= {"K_BITS": bits[0], "V_BITS": bits[1]}
    # Triton specialises arguments equal to 1 as constants.
    constants |= {"B": 1, "S": 1} if one_token else {}
    strides = [name for name in rope_kv_kernel.arg_names if name.endswith(("_batch", "_head", "_token"))]
    signature = POINTERS | dict.fromkeys(COUNTS, "i32") | dict.fromkeys(strides, "i32:16")
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    return compiled(rope_kv_kernel, signature, constants, arch, warps=4, stages=1)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_heads_of_128(arch: int) -> None:
    code = code_of(128, True, arch)
    assert code.spills == 0 and code.registers <= 192 and code.shared <= 16 * 1024
    # Two halves of 16 heads, 64 by 64, in two TF32 parts: 64 products of 16 by 8 by 8 for each of four warps.
    assert code.count("HMMA") == 64
    assert "div.rn.f32" in code.ptx and "div.full" not in code.ptx


@pytest.mark.parametrize(("size", "rotate", "registers"), [(128, False, 64), (80, True, 192), (64, True, 96)])
def test_other_heads_on_hopper(size: int, rotate: bool, registers: int) -> None:
    code = code_of(size, rotate, 90)
    assert code.spills == 0 and code.registers <= registers and code.shared <= 32 * 1024


@pytest.mark.parametrize("bits", [(8, 8), (8, 4)], ids=str)
def test_other_bits_on_hopper(bits: tuple[int, int]) -> None:
    code = code_of(128, True, 90, bits=bits)
    assert code.spills == 0 and code.registers <= 192 and code.shared <= 16 * 1024


def test_one_token_on_hopper() -> None:
    assert code_of(128, True, 90, one_token=True).spills == 0
