"""qpcompile::linear_w8a16: rows rounded to 8 bits, the float product with them, in torch, in C and in ONNX."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.linear_w8a16 import cpu, op, reference
from qpcompile.kernels.linear_w8a16 import onnx as translation
from qpcompile.kernels.native import library as native

LEVELS = range(native.library().level + 1) if native.available() else []
SHAPES = [(1, 1, 1), (1, 1024, 67), (3, 37, 65), (8, 100, 7), (5, 64, 64), (4, 33, 4), (17, 80, 130)]
"""(tokens, in_features, out_features)."""
UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The relative error of a result: of sums in another order, or of one rounding."""
levels = pytest.mark.parametrize("level", LEVELS)


def random_weight(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes: i8[N, K], scale: f32[N, 1], and the dense f64[N, K] that they represent."""
    made = torch.Generator().manual_seed(out_features + in_features)
    codes, scale = reference.quantize_rows(torch.randn(out_features, in_features, generator=made))
    return codes, scale, codes.double() * scale.double()


def test_by_hand() -> None:
    codes, scale = reference.quantize_rows(torch.tensor([[1.27, -0.5, 0.004], [0, 0, 0], [254, -254, 3]]))
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0], [127, -127, 2]]  # 1.5 steps round to the even code
    torch.testing.assert_close(scale, torch.tensor([[0.01], [1.0], [2.0]]))
    y = reference.linear_w8a16(torch.tensor([[1.0, 0.5, 2.0]]), codes, scale, torch.tensor([0.0, 3.0, 1.0]))
    torch.testing.assert_close(y, torch.tensor([[1.02, 3.0, 1 + 2 * (127 - 63.5 + 4)]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_half_a_step_in_any_number_of_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(2 * reference.CHUNK + 3, 5).to(dtype)
    codes, scale = reference.quantize_rows(weight)
    assert codes.shape == weight.shape and scale.shape == (len(weight), 1)
    assert (weight.double() - codes * scale.double()).abs().le(0.5001 * scale).all()
    assert codes.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("in_features", "out_features"), [(3, 1), (33, 7), (96, 65), (10, 1030)])
@pytest.mark.parametrize("tokens", [0, 1, 17, cpu.FEW_ROWS, cpu.FEW_ROWS + 1])
def test_op_is_the_float_product(tokens: int, in_features: int, out_features: int, biased: bool) -> None:
    codes, scale, dense = random_weight(out_features, in_features)
    x, bias = torch.randn(2, tokens, in_features), torch.randn(out_features) if biased else None
    found = torch.ops.qpcompile.linear_w8a16(x, codes, scale, bias)
    expected = x.double() @ dense.T + (0 if bias is None else bias)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, reference.linear_w8a16(x, codes, scale, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    codes, scale, dense = random_weight(7, 96)
    x, bias = torch.randn(2, 5, 96).to(dtype), torch.randn(7).to(dtype)
    for term in (None, bias):
        found = torch.ops.qpcompile.linear_w8a16(x, codes, scale, term)
        expected = x.double() @ dense.T + (0 if term is None else term.double())
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=UNITS[dtype], atol=1e-5)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_in_c(shape: tuple[int, int, int], biased: bool, dtype: torch.dtype, level: int) -> None:
    tokens, columns, features = shape
    codes, scale, dense = random_weight(features, columns)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(features).to(dtype) if biased else None
    y = cpu._native(x, codes, scale, bias, level)
    # Float32 sums in a different order may round to the neighbour.
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=UNITS[dtype], atol=1e-4)
    for row in range(tokens):
        assert torch.equal(y[row : row + 1], cpu._native(x[row : row + 1], codes, scale, bias, level))


@levels
def test_every_code_in_every_place(level: int) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].repeat(1, 70)
    y = cpu._native(torch.eye(70)[:32], codes, torch.ones(256, 1), None, level)
    assert torch.equal(y, torch.arange(-128.0, 128.0).expand(32, -1))


@levels
def test_what_is_not_finite(level: int) -> None:
    x, codes = torch.ones(2, 40).bfloat16(), torch.ones(3, 40, dtype=torch.int8)
    x[0, 7], x[1, 39] = torch.inf, torch.nan
    y = cpu._native(x, codes, torch.tensor([[1.0], [torch.nan], [2.0]]), None, level)
    assert y[0].tolist()[::2] == [torch.inf, torch.inf] and y[:, 1].isnan().all() and y[1].isnan().all()


@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
@pytest.mark.usefixtures("two_threads")
def test_threads_give_the_same_bits() -> None:
    codes, scale, _ = random_weight(700, 1024)
    x = torch.randn(3, 1024).bfloat16()
    two = cpu._native(x, codes, scale, None)
    torch.set_num_threads(1)
    assert torch.equal(two, cpu._native(x, codes, scale, None))


def test_the_rest_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_native", lambda *given: pytest.fail("few rows alone"))
    codes, scale, _ = random_weight(6, 40)
    one, many = torch.randn(1, 40), torch.randn(cpu.FEW_ROWS + 1, 40)
    for x, bias in ((one.half(), None), (one, torch.randn(6).double()), (many, None)):
        assert torch.equal(cpu.linear_w8a16(x, codes, scale, bias), reference.linear_w8a16(x, codes, scale, bias))
    assert cpu.linear_w8a16(torch.randn(0, 40), codes, scale, None).shape == (0, 6)


def test_non_contiguous() -> None:
    codes, scale, dense = random_weight(14, 96)
    found = torch.ops.qpcompile.linear_w8a16(torch.ones(96, 5).T, codes[::2], scale[::2], None)
    torch.testing.assert_close(found, dense.sum(1)[::2].float().expand(5, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["plain", "bias"])
def test_opcheck(bias: Tensor | None) -> None:
    codes, scale, _ = random_weight(7, 33)
    torch.library.opcheck(op.linear_w8a16, (torch.randn(2, 3, 33), codes, scale, bias))


@pytest.mark.parametrize(
    ("operands", "said"),
    [
        (
            (torch.zeros(7, 32, dtype=torch.uint8), torch.ones(7, 1), None),
            r"weight is u8\[7, 32\], but must be i8\[N, K\]",
        ),
        ((torch.zeros(7, 31, dtype=torch.int8), torch.ones(7, 1), None), "K is 32 and not 31"),
        (
            (torch.zeros(7, 32, dtype=torch.int8), torch.ones(7, 2), None),
            r"weight_scale is f32\[7, 2\], but must be f32\[N, 1\]",
        ),
        ((torch.zeros(7, 32, dtype=torch.int8), torch.ones(7, 1), torch.ones(6)), "N is 7 and not 6"),
    ],
)
def test_refuses_operands_that_do_not_belong_together(operands: Any, said: str) -> None:
    with pytest.raises(KernelError, match=said):
        torch.ops.qpcompile.linear_w8a16(torch.zeros(1, 32), *operands)


class Heads(torch.nn.Module):
    """A layer in float, one with a bias, one on half precision; so large that torch's exporter folds nothing."""

    def __init__(self) -> None:
        super().__init__()
        codes, scale, _ = random_weight(300, 96)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = torch.nn.Parameter(torch.randn(300))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = torch.ops.qpcompile.linear_w8a16
        return (
            linear(x, self.codes, self.scale, None),
            linear(x, self.codes, self.scale, self.bias),
            linear(x.half(), self.codes, self.scale, self.bias),
        )


def test_onnx_stores_8_bits_and_is_the_op(export_onnx: Any) -> None:
    module = Heads()
    exported = export_onnx(module, [torch.randn(2, 5, 96)], {op.OVERLOAD: translation.linear_w8a16})
    assert not any("::" in each for each in exported.operators)
    assert exported.initializers_of(onnx.TensorProto.INT8) == [(300, 96)]
    for shape in ((1, 1, 96), (3, 17, 96)):
        x = torch.randn(shape)
        found, expected = exported(x), module(x)
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        torch.testing.assert_close(found[:2], list(expected[:2]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], rtol=2e-3, atol=2e-3)
