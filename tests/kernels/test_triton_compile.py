"""Triton's kernels compile ahead of time for Hopper, without a GPU, to the instructions they are designed for."""

import os
import re
from collections.abc import Mapping
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)


def compile_for_hopper(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], warps: int) -> Any:
    """The compiled kernel; `pointers` types the arguments, the rest are `constants`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, type_ in pointers.items() if type_[0] == "*"}
    signature = {name: pointers.get(name, "constexpr") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": warps, "num_stages": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_quantize_dynamic_divides_exactly() -> None:
    from qpcompile.kernels.quantize_dynamic.triton import quantize_dynamic_kernel

    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "clip_ratio": "fp32"}
    ptx = compile_for_hopper(quantize_dynamic_kernel, pointers, {"HIGHEST": 127, "GROUP": 1000, "BLOCK": 1024}, 2).asm[
        "ptx"
    ]
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)|fma\.rn\.f32|\.ftz", ptx)
