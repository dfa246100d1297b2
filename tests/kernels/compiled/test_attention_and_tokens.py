"""The machine code of cache, attention and token kernels on Hopper at the sizes of 7B models: no spills."""

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.attention_kv.triton import decode_kernel, join_kernel
from qpcompile.kernels.dpp_select.triton import greedy_kernel
from qpcompile.kernels.kv_write.triton import kv_write_kernel
from qpcompile.kernels.rope.triton import rope_kernel
from qpcompile.kernels.select_tokens.triton import compact_kernel, rank_kernel
from qpcompile.kernels.token_scores.triton import column_sums_kernel, row_sums_kernel

TYPES = {"q_ptr": "*bf16", "k_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16", "codes_ptr": "*u8", "mask_ptr": "*u8"}
TYPES |= {"k_codes_ptr": "*u8", "v_codes_ptr": "*u8", "groups_ptr": "*u8", "counted_ptr": "*u8", "valid_ptr": "*u8"}
TYPES |= {"rank_ptr": "*i32", "filled_ptr": "*i64", "quota_ptr": "*i64", "index_ptr": "*i64", "turns_ptr": "*i64"}
TYPES |= {"matrix_ptr": "*fp64", "basis_ptr": "*fp64", "scale": "fp32"}


def code_of(kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 3, **types: str) -> Compiled:
    """Compiled for sm_90; unnamed pointers are float32, unnamed numbers int32."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature |= {name: kind for name, kind in (TYPES | types).items() if name in names}
    return compiled(kernel, signature, constants, 90, warps, stages)


HEAD = {"D": 128, "SHARE": 7, "ROWS": 16}
PADS = {4: 64, 8: 128}


def bits_of(k_bits: int, v_bits: int) -> dict[str, int]:
    return {"K_BITS": k_bits, "V_BITS": v_bits, "K_PAD": PADS[k_bits], "V_PAD": PADS[v_bits]}


# 7 query heads share a key, as in Qwen2.5-VL-7B; 64 TF32 products are 4 of 16 by 64 by 64, float32 takes twice as many.
@pytest.mark.parametrize(
    ("bits", "dtype", "filled", "registers"),
    [
        ((4, 4), "*bf16", False, 168),
        ((4, 4), "*bf16", True, 168),
        ((4, 4), "*fp32", False, 208),
        ((4, 4), "*fp32", True, 208),
        ((8, 8), "*bf16", True, 168),
        ((8, 8), "*fp32", False, 240),
        ((8, 4), "*bf16", False, 168),
        ((8, 4), "*fp32", True, 232),
    ],
    ids=str,
)
def test_decode_attention(bits: tuple[int, int], dtype: str, filled: bool, registers: int) -> None:
    products = 128 if dtype == "*fp32" else 64
    constants = {**HEAD, **bits_of(*bits), "KEYS": 64, "MASK": "bool", "FILLED": filled, "EXACT": dtype == "*fp32"}
    code = code_of(decode_kernel, constants, q_ptr=dtype)
    assert code.spills == 0 and code.registers <= registers
    assert code.loop_count("HMMA") == products
    # Three stages of codes in flight, and four blocks on a multiprocessor; or as many as registers allow.
    blocks = 4 if registers < 232 else 3
    assert "cp.async" in code.ptx and code.shared <= 227 * 1024 // blocks


def test_one_key_is_a_constant() -> None:
    # Triton specialises arguments equal to 1 as constants.
    constants = {
        **HEAD,
        **bits_of(8, 4),
        "KEYS": 64,
        "MASK": "none",
        "EXACT": False,
        "Q": 1,
        "S": 1,
        "G": 1,
        "most_splits": 1,
    }
    for filled in (False, True):
        assert code_of(decode_kernel, {**constants, "FILLED": filled}, q_ptr="*bf16").spills == 0


def test_join() -> None:
    for bits in PADS:
        assert code_of(join_kernel, {**HEAD, "BITS": bits, "PAD": PADS[bits], "SPLITS": 64}).spills == 0


SCORES = {"D": 128, "PAD": 128, "SHARE": 7, "GROUPS": 2, "ROWS": 32, "KEYS": 64}


@pytest.mark.parametrize("kernel", [row_sums_kernel, column_sums_kernel], ids=["rows", "columns"])
@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_scores(kernel: Any, mask: str) -> None:
    code = code_of(kernel, {**SCORES, "MASK": mask, "PRECISION": "tf32"}, stages=2)
    assert code.spills == 0 and code.loop_count("HMMA") == 64


@pytest.mark.parametrize("bits", [4, 8])
def test_cache_write(bits: int) -> None:
    constants = {"D": 128, "WIDTH": 16 * bits, "PAD": PADS[bits], "BITS": bits, "ROWS": 16}
    code = code_of(kv_write_kernel, constants, warps=2)
    assert code.spills == 0 and code.registers <= 96
    assert "div.rn.f32" in code.ptx and "div.full" not in code.ptx


def test_rotary_positions() -> None:
    code = code_of(rope_kernel, {"HALF": 64, "PAD": 64, "ROWS": 16}, warps=2, cos_ptr="*bf16", sin_ptr="*bf16")
    assert code.spills == 0 and code.registers <= 128


@pytest.mark.parametrize(("size", "piece"), [(1024, 8), (4096, 2)])
def test_greedy_turns(size: int, piece: int) -> None:
    code = code_of(greedy_kernel, {"SIZE": size, "PIECE": piece}, warps=16)
    assert code.spills == 0 and code.registers <= 128


def test_selection() -> None:
    assert code_of(rank_kernel, {"TOKENS": 64, "OTHERS": 128}).spills == 0
    assert code_of(compact_kernel, {"WALK": 1024}).spills == 0
