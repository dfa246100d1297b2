"""The machine code of the rotation kernels at model widths: products on tensor cores in TF32, tiles in registers."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.hadamard.triton import (
    Tiling,
    hadamard_kernel,
    norm_of,
    odd_factor,
    plain_tiling,
    rotated_tiling,
)
from qpcompile.kernels.kronecker.triton import factor_tiling
from qpcompile.kernels.transform_quantize.triton import rows_kernel

HADAMARD = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "inner_ptr": "*fp32", "y_ptr": "*bf16", "T": "i32"}
ROWS = {"x_ptr": "*bf16", "up_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "scale_ptr": "*fp32"}
ROWS |= {"left_ptr": "*fp32", "right_ptr": "*fp32", "shift_ptr": "*fp32", "y_ptr": "*i8", "token_scale_ptr": "*fp32"}
ROWS |= {"Q": "i32", "G": "i32", "splits": "i32"}
NOT_JOINED = {"D": 0, "BITS": 8, "V_PAD": 1, "SHARE": 1, "HEAD_ROWS": 1}
ROWS |= {"T": "i32", "x_stride": "i32:16", "up_stride": "i32:16", "eps": "fp32", "clip_ratio": "fp32"}


def code_of(kernel: Any, signature: dict[str, str], tiling: Tiling | None, arch: int, **constants: Any) -> Compiled:
    assert tiling is not None
    shape = dict(zip(("C", "TOKENS", "OUTER", "MIDDLE", "INNER", "PAD"), tiling.shape, strict=True))
    shape |= {"norm": norm_of(tiling.channels), "ODD": odd_factor(tiling.channels), "FILLED": tiling.filled}
    shape |= {"PARTS": tiling.parts, "HIGHEST": 127, "SCALED": False, "SHIFTED": False, "GATED": False}
    shape |= NOT_JOINED | constants
    named = {name: value for name, value in shape.items() if name in kernel.arg_names}
    return compiled(kernel, signature, named, arch, tiling.warps, stages=1)


def rotated(kind: str, channels: int, arch: int) -> Compiled:
    """The kernel that computes rows, rotates them, and writes codes where one tile holds a token."""
    tiling = rotated_tiling(channels)
    codes = tiling is not None and tiling.parts == 1
    constants = {"KIND": kind, "CHANGE": "rotated", "GATED": kind == "silu", "CODES": codes}
    return code_of(rows_kernel, ROWS | {"y_ptr": "*i8" if codes else "*fp32"}, tiling, arch, **constants)


# Shared memory of a block: 164 KiB on sm_80, 228 KiB on sm_90 and sm_100, less 1 KiB reserved by the system.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("channels", [1280, 4096, 11008, 18944])
def test_hadamard_on_hopper(channels: int) -> None:
    code = code_of(hadamard_kernel, HADAMARD, rotated_tiling(channels), 90)
    assert code.spills == 0 and code.shared <= SHARED[90]
    # Products by +-1 take two TF32 products, those by the DCT three; none uses the float units.
    assert code.count("HGMMA") + code.count("HMMA") >= 32
    assert code.count("FFMA") < 40


@pytest.mark.parametrize("arch", [80, 100])
def test_hadamard_elsewhere(arch: int) -> None:
    code = code_of(hadamard_kernel, HADAMARD, rotated_tiling(4096), arch)
    assert code.spills == 0 and code.shared <= SHARED[arch]


@pytest.mark.parametrize(("arch", "registers"), [(80, 255), (90, 136), (100, 160)])
def test_norm(arch: int, registers: int) -> None:
    code = rotated("rmsnorm", 4096, arch)
    assert code.spills == 0 and code.registers <= registers and code.shared <= SHARED[arch]
    # 32 values a thread in bfloat16: 16 bytes at a time, of the token and of the weight.
    assert code.count("LDG") == 8


@pytest.mark.parametrize("channels", [11008, 18944])
def test_gate_on_hopper(channels: int) -> None:
    code = rotated("silu", channels, 90)
    # 16 warps may have 128 registers a thread.
    assert code.spills == 0 and code.registers <= 128 and code.shared <= SHARED[90]
    assert code.count("HGMMA") == 56


@pytest.mark.parametrize("arch", [80, 100])
def test_gate_elsewhere(arch: int) -> None:
    code = rotated("silu", 11008, arch)
    assert code.shared <= SHARED[arch]
    # Without Hopper's products 16 warps exceed 128 registers: 91 and 123 accesses to spilled values.
    assert code.spills <= 130


@pytest.mark.parametrize("arch", [80, 90])
def test_attention_is_joined_in_the_quantizer(arch: int) -> None:
    """The heads of a token of Llama 3 8B, on which the keys were split, are never stored."""
    joined = {"D": 128, "BITS": 4, "V_PAD": 64, "SHARE": 4, "HEAD_ROWS": 16}
    constants = {"KIND": "plain", "CHANGE": "rotated", "CODES": True, **joined}
    types = {"up_ptr": "*fp32", "weight_ptr": "*fp32"}
    code = code_of(rows_kernel, ROWS | types, rotated_tiling(4096), arch, **constants)
    assert code.spills == 0 and code.shared <= SHARED[arch]
    assert code.count("STG") <= 4


@pytest.mark.parametrize("arch", [80, 90])
def test_gate_without_a_quantizer(arch: int) -> None:
    constants = {"KIND": "silu", "CHANGE": "none", "GATED": True, "CODES": False}
    code = code_of(rows_kernel, ROWS | {"y_ptr": "*bf16"}, plain_tiling(11008), arch, **constants)
    assert code.spills == 0 and code.shared <= SHARED[arch]


@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "silu"])
@pytest.mark.parametrize(
    ("left", "right", "arch", "registers"),
    [
        (64, 64, 90, 128),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((128, 86, 90, 240), (64, 64, 100, 128), (32, 32, 80, 96))
        ),
    ],
)
def test_learned_factors(kind: str, left: int, right: int, arch: int, registers: int) -> None:
    tiling = factor_tiling(torch.empty(left, left), torch.empty(right, right))
    constants = {"KIND": kind, "CHANGE": "factors", "GATED": kind == "silu", "SHIFTED": True, "CODES": True}
    code = code_of(rows_kernel, ROWS, tiling, arch, **constants)
    assert code.spills == 0 and code.registers <= registers and code.shared <= SHARED[arch]
    # Three TF32 products for each of the two; the float units add the results of the tensor cores.
    assert arch == 100 or code.count("HGMMA") + code.count("HMMA") >= 48
