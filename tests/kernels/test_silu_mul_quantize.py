"""qpcompile::silu_mul_quantize: by hand, equal to the composition of its parts bit for bit, and in ONNX."""

import math
from typing import Any

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_int4.reference import quantize_int4
from qpcompile.kernels.silu_mul_quantize import cpu, op, reference
from qpcompile.kernels.silu_mul_quantize import onnx as translation
from qpcompile.kernels.sums import wide_type


def test_by_hand() -> None:
    gate = torch.tensor([[math.log(3.0), 0.0, -math.log(3.0), 50.0], [0.0, 0.0, 0.0, 0.0]])
    up = torch.tensor([[4.0, 9.0, 8.0, -0.14], [1.0, 2.0, 3.0, 4.0]])
    # sigmoid(ln 3) = 3 / 4: the products are 3.296, 0, -2.197 and -7.
    q, scale = reference.silu_mul_quantize(gate, up, None, False, 0, 1.0)
    assert q.tolist() == [[3, 0, -2, -7], [0, 0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(1, 63, 0), (17, 144, 36), (63, 96, 0), (1000, 33, 3)])
def test_op_is_the_composition(
    tokens: int, channels: int, group_size: int, scaled: bool, rotate: bool, dtype: torch.dtype
) -> None:
    gate, up = (torch.randn(2, tokens, channels) * 5).to(dtype)
    up[:1] = 0
    transform_scale = torch.rand(channels) + 0.5
    product = reference.silu_mul(gate, up)
    scale_or_none = transform_scale if scaled else None
    values = transform(product, scale_or_none, rotate, wide_type(gate))
    found = torch.ops.qpcompile.silu_mul_quantize(gate, up, scale_or_none, rotate, group_size, 0.9)
    expected = quantize_int4(values, group_size, 0.9)
    if dtype == torch.float32:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    else:
        # Sums in float32, which depend on the summation order.
        assert_codes_agree(found, expected, values, tiles=rotate and native.library().amx)


def test_activation_is_torchs() -> None:
    gate, up = torch.randn(2, 5, 63) * 20
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(cpu.silu_mul(gate, up), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(cpu.silu_mul(gate, up), reference.silu_mul(gate, up))


def test_non_contiguous_and_untouched() -> None:
    both = torch.randn(2, 48, 5).transpose(1, 2)
    before = both.clone()
    found = torch.ops.qpcompile.silu_mul_quantize(both[0], both[1], None, False, 0, 1.0)
    expected = reference.silu_mul_quantize(both[0].contiguous(), both[1].contiguous(), None, False, 0, 1.0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(both, before)


@pytest.mark.parametrize("scale", [None, torch.ones(12)], ids=["plain", "scaled"])
def test_opcheck(scale: Tensor | None) -> None:
    arguments = (torch.randn(2, 3, 12), torch.randn(2, 3, 12), scale, scale is not None, 4, 0.95)
    torch.library.opcheck(op.silu_mul_quantize, arguments)


class Gates(torch.nn.Module):
    """The plain form, and the one with everything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(144) + 0.5)

    def forward(self, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        product = torch.ops.qpcompile.silu_mul_quantize
        return (*product(gate, up, None, False, 0, 1.0), *product(gate, up, self.scale, True, 36, 0.9))


def test_onnx_is_the_op(export_onnx: Any) -> None:
    module = Gates()
    inputs = [torch.randn(2, 5, 144), torch.randn(2, 5, 144)]
    exported = export_onnx(module, inputs, {op.OVERLOAD: translation.silu_mul_quantize})
    assert not any("::" in each for each in exported.operators)
    for shape in ((1, 1, 144), (3, 17, 144)):
        gate, up = torch.randn(2, *shape) * 5
        found, expected = exported(gate, up), module(gate, up)
        # Computed in float64, rounded once: the same codes on every back end.
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
