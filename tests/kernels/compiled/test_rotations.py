"""The machine code of the rotation kernels at model widths: products on tensor cores in TF32, tiles in registers."""

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.hadamard.triton import hadamard_kernel, norm_of, odd_factor, rotated_tiling
from qpcompile.kernels.kronecker.triton import kronecker_kernel, warps
from qpcompile.kernels.rmsnorm_quantize.triton import norm_quantize_kernel
from qpcompile.kernels.silu_mul_quantize.triton import silu_mul_quantize_kernel

HADAMARD = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "inner_ptr": "*fp32", "y_ptr": "*bf16", "T": "i32"}
NORM = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "transform_ptr": "*fp32", "inner_ptr": "*fp32"}
NORM |= {"y_ptr": "*i8", "scale_ptr": "*fp32", "T": "i32", "eps": "fp32", "clip_ratio": "fp32"}
SILU = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "transform_ptr": "*fp32", "inner_ptr": "*fp32", "y_ptr": "*i8"}
SILU |= {"scale_ptr": "*fp32", "T": "i32", "clip_ratio": "fp32"}

KRONECKER = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "left_ptr": "*fp32", "right_ptr": "*fp32", "y_ptr": "*i8"}
KRONECKER |= {"token_scale_ptr": "*fp32", "clip_ratio": "fp32"}


def code_of(kernel: Any, signature: dict[str, str], channels: int, arch: int, **constants: Any) -> Compiled:
    tiling = rotated_tiling(channels)
    assert tiling is not None
    shape = dict(zip(("C", "TOKENS", "OUTER", "MIDDLE", "INNER", "PAD"), tiling.shape, strict=True))
    shape |= {"norm": norm_of(channels), "ODD": odd_factor(channels), "SCALED": False, "ROTATED": True}
    shape |= {"PARTS": tiling.parts, "CODES": tiling.parts == 1, **constants}
    named = {name: value for name, value in shape.items() if name in kernel.arg_names}
    return compiled(kernel, signature, named, arch, tiling.warps, stages=1)


# Shared memory of a block: 164 KiB on sm_80, 228 KiB on sm_90 and sm_100, less 1 KiB reserved by the system.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("channels", [1280, 4096, 11008, 18944])
def test_hadamard_on_hopper(channels: int) -> None:
    code = code_of(hadamard_kernel, HADAMARD, channels, 90)
    assert code.spills == 0 and code.shared <= SHARED[90]
    # Products by +-1 take two TF32 products, those by the DCT three; none uses the float units.
    assert code.count("HGMMA") + code.count("HMMA") >= 32
    assert code.count("FFMA") < 40


@pytest.mark.parametrize("arch", [80, 100])
def test_hadamard_elsewhere(arch: int) -> None:
    code = code_of(hadamard_kernel, HADAMARD, 4096, arch)
    assert code.spills == 0 and code.shared <= SHARED[arch]


@pytest.mark.parametrize(("arch", "registers"), [(80, 255), (90, 136), (100, 160)])
def test_norm(arch: int, registers: int) -> None:
    code = code_of(norm_quantize_kernel, NORM, 4096, arch, CENTERED=False)
    assert code.spills == 0 and code.registers <= registers and code.shared <= SHARED[arch]
    # 32 values a thread in bfloat16: 16 bytes at a time, of the token and of the weight.
    assert code.count("LDG") == 8


@pytest.mark.parametrize("channels", [11008, 18944])
def test_gate_on_hopper(channels: int) -> None:
    y = {"y_ptr": "*i8" if channels == 11008 else "*fp32"}
    code = code_of(silu_mul_quantize_kernel, SILU | y, channels, 90)
    # 16 warps may have 128 registers a thread.
    assert code.spills == 0 and code.registers <= 128 and code.shared <= SHARED[90]
    assert code.count("HGMMA") == 56


@pytest.mark.parametrize("arch", [80, 100])
def test_gate_elsewhere(arch: int) -> None:
    code = code_of(silu_mul_quantize_kernel, SILU, 11008, arch)
    assert code.shared <= SHARED[arch]
    # Without Hopper's products 16 warps exceed 128 registers: 91 and 123 accesses to spilled values.
    assert code.spills <= 130


@pytest.mark.parametrize(
    ("left", "right", "arch", "registers"),
    [(64, 64, 90, 128), (128, 86, 90, 224), (64, 64, 100, 128), (32, 32, 80, 96)],
)
def test_learned_factors(left: int, right: int, arch: int, registers: int) -> None:
    rows, columns = (1 << (side - 1).bit_length() for side in (left, right))
    shape = {"LEFT": left, "RIGHT": right, "ROWS": rows, "COLUMNS": columns, "SCALED": False, "CODES": True}
    code = compiled(kronecker_kernel, KRONECKER, shape, arch, warps(rows, columns), stages=1)
    assert code.spills == 0 and code.registers <= registers and code.shared <= SHARED[arch]
    # Three TF32 products for each of the two; the float units add the results of the tensor cores.
    assert arch == 100 or code.count("HGMMA") + code.count("HMMA") >= 48
