"""The machine code of expert_linear_int's kernel: int8 products, no spills, on the architectures of linear_int."""

import os

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernels.compiled.sass import Compiled, compiled

from qpcompile.kernels.expert_linear_int.triton import FEW, MANY, expert_linear_int_kernel
from qpcompile.kernels.linear_int.tuning import Tile


def experts(tile: Tile, packed: bool, arch: int = 90) -> Compiled:
    """The kernel for 128 experts of K = 2048, 8 of them per token."""
    signature = {"w_ptr": "*i8", "q_ptr": "*i8", "scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    signature |= dict.fromkeys(("order_ptr", "expert_ptr", "first_ptr", "end_ptr"), "*i64")
    signature |= {"y_ptr": "*bf16", "N": "i32:16"}
    plane = 128 if packed else 2048
    constants = {"REPEATS": 8, "EXPERTS": 128, "K": 2048, "PLANE": plane, "PACKED": packed}
    constants |= {"OUT": tile.out, "TOKENS": tile.tokens, "STEP": tile.step}
    return compiled(expert_linear_int_kernel, signature, constants, arch, tile.warps, tile.stages)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tile", [FEW, MANY], ids=str)
def test_hopper(tile: Tile, packed: bool) -> None:
    code = experts(tile, packed)
    assert code.count("IGMMA") + code.count("IMMA") > 0
    assert code.spills == 0
    assert code.shared <= 227 * 1024


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch: int) -> None:
    code = experts(FEW, True, arch=arch)
    assert code.spills == 0
    assert sum(code.count(each) for each in ("IMMA", "UTCIMMA")) > 0
