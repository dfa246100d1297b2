"""qpcompile::activation_quantize: by hand, equal to the composition of its parts bit for bit, and in ONNX."""

import math
from typing import Any

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from kernels.epilogues import CHANGES, Transforms, arguments_of, check_onnx, epilogue_of

from qpcompile.kernels.activation_quantize import cpu, op, reference
from qpcompile.kernels.activation_quantize import onnx as translation
from qpcompile.kernels.activation_quantize.reference import FUNCTIONS
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue


def test_by_hand() -> None:
    gate = torch.tensor([[math.log(3.0), 0.0, -math.log(3.0), 50.0], [0.0, 0.0, 0.0, 0.0]])
    up = torch.tensor([[4.0, 9.0, 8.0, -0.14], [1.0, 2.0, 3.0, 4.0]])
    # sigmoid(ln 3) = 3 / 4: the products are 3.296, 0, -2.197 and -7.
    q, scale = reference.activation_quantize(gate, up, "silu", *arguments_of(Epilogue()))
    assert q.tolist() == [[3, 0, -2, -7], [0, 0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 1.0])
    # The normal distribution's function at 1 is 0.8413; both approximations are near it.
    one = torch.ones(1, 1)
    assert reference.activation(one, None, "gelu").item() == pytest.approx(0.841345, abs=1e-6)
    assert reference.activation(one, None, "gelu_tanh").item() == pytest.approx(0.841192, abs=1e-6)
    assert reference.activation(one, None, "gelu_sigmoid").item() == pytest.approx(0.845796, abs=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [False, True], ids=["", "scaled and shifted"])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(1, 63, 0), (17, 144, 36), (63, 96, 0), (1000, 33, 3)])
def test_op_is_the_composition(
    tokens: int, channels: int, group_size: int, more: bool, change: str, function: str, dtype: torch.dtype
) -> None:
    x, up = (torch.randn(2, tokens, channels) * 5).to(dtype)
    up[:1] = 0
    gate = up if more else None
    end = epilogue_of(channels, change, scaled=more, shifted=more, group_size=group_size)
    values = end.transformed(reference.activation(x, gate, function), wide_type(x))
    found = torch.ops.qpcompile.activation_quantize(x, gate, function, *arguments_of(end))
    expected = quantize_dynamic(values, group_size, 0.9)
    if dtype == torch.float64:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    else:
        # Sums in float32, which depend on the summation order.
        assert_codes_agree(found, expected, values, tiles=change != "none" and native.library().amx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_views_are_their_copies(dtype: torch.dtype) -> None:
    """Gate and up as views of one product; rows with a gap between batches, backwards, repeated."""
    product = (torch.randn(3, 5, 4 * 33) * 5).to(dtype)
    gate, up, *_ = product.split(33, dim=-1)
    views = [(gate, up), (gate[:, :4], up[:, :4]), (gate[:, ::2], None), (gate[:1].expand(3, 5, 33), up)]
    views += [(gate.mT.contiguous().mT, up), (gate[0, 0], up[0, 0]), (gate[:, :1], up[:, 4:])]
    end = arguments_of(epilogue_of(33, "rotated", shifted=True))
    for x, other in views:
        found = torch.ops.qpcompile.activation_quantize(x, other, "silu", *end)
        copies = x.contiguous(), None if other is None else other.contiguous()
        expected = torch.ops.qpcompile.activation_quantize(*copies, "silu", *end)
        assert all(map(torch.equal, found, expected))


def test_every_float_in_c() -> None:
    """Every bfloat16, and what lies between them near zero: rounded once from float64, or near that in float32."""
    if not native.available():
        pytest.skip(native.library().problem)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = torch.cat([every[every.isfinite()], torch.linspace(-12, 12, 2**16)])
    x = x[: len(x) // 64 * 64].view(-1, 64)
    for function in FUNCTIONS:
        found, near = (cpu.row_plan(cpu.KINDS[function], y, Epilogue(), None).stored(y) for y in (x.double(), x))
        expected = reference.activation(x.double(), None, function)
        assert ((near - expected).abs() <= 3e-7 * x.abs() + 1e-35).all()
        # A result below the smallest normal number may be zero.
        assert ((found - expected).abs() <= expected.abs() * 2**-23 + 1e-37).all()
        assert (found != expected).float().mean() < 1e-4


def test_non_contiguous_and_untouched() -> None:
    both, end = torch.randn(2, 48, 5).transpose(1, 2).double(), arguments_of(Epilogue())
    before = both.clone()
    found = torch.ops.qpcompile.activation_quantize(both[0], both[1], "silu", *end)
    expected = reference.activation_quantize(both[0].contiguous(), both[1].contiguous(), "silu", *end)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(both, before)


@pytest.mark.parametrize("up", [None, torch.randn(2, 3, 12)], ids=["plain", "gated"])
def test_opcheck(up: torch.Tensor | None) -> None:
    end = epilogue_of(12, "rotated", scaled=True, group_size=4)
    torch.library.opcheck(op.activation_quantize, (torch.randn(2, 3, 12), up, "gelu_tanh", *arguments_of(end)))


class Activation(torch.nn.Module):
    """One function, plain or gated, with every epilogue."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.plain = Transforms(op.OVERLOAD, None, function)
        self.gated = Transforms(op.OVERLOAD, function)

    def forward(self, x: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*self.plain.results(x), *self.gated.results(x, up))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_onnx_is_the_op(export_onnx: Any, function: str) -> None:
    check_onnx(export_onnx, Activation(function), {op.OVERLOAD: translation.activation_quantize}, sources=2)
