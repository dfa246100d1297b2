"""qpcompile::activation: the reference at every instruction set, views, unwritten results, and in ONNX."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.activation import cpu, op, reference
from qpcompile.kernels.activation import onnx as translation
from qpcompile.kernels.activation_quantize.reference import FUNCTIONS
from qpcompile.kernels.native import library as native

pytestmark = pytest.mark.usefixtures("poison")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEVELS = range(native.library().level + 1) if native.available() else ()


def near(found: Tensor, expected: Tensor) -> None:
    """Equal up to the last bit of their type, or of float32 for rows in float64, which hold float32 values."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    step = torch.finfo(torch.float32 if found.dtype == torch.float64 else found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * step, atol=2e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 63), (3, 0, 12), (2, 17, 144), (301, 33)], ids=str)
def test_op_is_the_reference(shape: tuple[int, ...], gated: bool, dtype: torch.dtype, function: str) -> None:
    x, up = (torch.randn(2, *shape) * 5).to(dtype)
    gate = up if gated else None
    near(torch.ops.qpcompile.activation(x, gate, function), reference.activation(x, gate, function))
    for level in LEVELS if dtype != torch.float16 else ():
        near(cpu._native(x, gate, function, level), reference.activation(x, gate, function))


def test_products_are_rounded_once() -> None:
    """In half precision the product is not of a rounded function: 3/4 of 1.0986 is between two values of bfloat16."""
    x, up = torch.tensor([[1.1]]).bfloat16(), torch.tensor([[3.0]]).bfloat16()
    once = (torch.nn.functional.silu(x.float()) * up.float()).bfloat16()
    assert torch.equal(torch.ops.qpcompile.activation(x, up, "silu"), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_views_are_their_copies(dtype: torch.dtype) -> None:
    """Gate and up as views of one product, with a gap between rows."""
    gate, up, *_ = (torch.randn(3, 5, 4 * 33) * 5).to(dtype).split(33, dim=-1)
    for x, other in ((gate, up), (gate[:, ::2], None), (gate[:1].expand(3, 5, 33), up), (gate.mT, up.mT)):
        found = torch.ops.qpcompile.activation(x, other, "gelu")
        copy = None if other is None else other.contiguous()
        assert torch.equal(found, torch.ops.qpcompile.activation(x.contiguous(), copy, "gelu"))


@pytest.mark.parametrize("up", [None, torch.randn(2, 3, 12)], ids=["plain", "gated"])
def test_opcheck(up: Tensor | None) -> None:
    torch.library.opcheck(op.activation, (torch.randn(2, 3, 12), up, "gelu_tanh"))


class Activations(torch.nn.Module):
    """Every function, plain and gated, and one in half precision."""

    def forward(self, x: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        made = [torch.ops.qpcompile.activation(x, other, name) for name in FUNCTIONS for other in (None, up)]
        return *made, torch.ops.qpcompile.activation(x.half(), up.half(), "silu")


def test_onnx_is_the_op(export_onnx: Any) -> None:
    module = Activations()
    for dtype in (torch.float64, torch.float32):
        inputs = [torch.randn(2, 5, 144).to(dtype) for _ in range(2)]
        exported = export_onnx(module, inputs, {op.OVERLOAD: translation.activation})
        assert not any("::" in each for each in exported.operators)
        for shape in ((1, 1, 144), (3, 17, 144)):
            inputs = [(torch.randn(shape) * 5).to(dtype) for _ in range(2)]
            for found, expected in zip(exported(*inputs), module(*inputs), strict=True):
                near(found, expected)
