"""qpcompile::linear_w4a16: the float product with the dequantized weight, torch, C, and ONNX with 4-bit weights."""

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.linear_w4a16 import cpu, op, reference
from qpcompile.kernels.linear_w4a16 import onnx as translation
from qpcompile.kernels.native import library as native

LEVELS = range(native.library().level + 1) if native.available() else []
SHAPES = [
    (1, 1, 1, 1),
    (1, 1024, 67, 4),
    (3, 37, 65, 1),
    (8, 99, 7, 3),
    (5, 33, 4, 11),
    (2, 2304, 5, 9),
    (16, 768, 3, 6),
    (2, 2300, 5, 1),
    (6, 512, 6, 8),
]
"""(tokens, in_features, out_features, groups): odd rows, more than a block of columns, groups that hold whole planes of
128 columns and groups that do not."""
UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The relative error of a result: of sums in another order, or of one rounding."""
levels = pytest.mark.parametrize("level", LEVELS)


def random_weight(out_features: int, in_features: int, groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """packed: u8[N, ceil(K/2)], scale: f32[N, groups], and the dense f64[N, K] that they represent."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8, generator=generator)
    scale = torch.rand(out_features, groups, generator=generator) / 8 + 0.01
    dense = codes.double() * scale.repeat_interleave(in_features // groups, 1)
    return pack_int4(codes), scale, dense


def test_by_hand() -> None:
    weight = pack_int4(torch.tensor([[1, -1, 0, 2], [-8, -8, 7, 7]], dtype=torch.int8))
    x = torch.tensor([[1.0, 0.5, 2.0, -1.0], [0.0, 1.0, 0.0, 1.0]])
    y = reference.linear_w4a16(x, weight, torch.tensor([[2.0], [0.5]]), torch.tensor([1.0, 0.0]))
    assert y.tolist() == [[1 + 2 * -1.5, 0.5 * (-8 - 4 + 14 - 7)], [1 + 2 * 1.0, 0.5 * -1.0]]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("in_features", "out_features"), [(3, 1), (33, 7), (96, 65), (768, 10)])
@pytest.mark.parametrize("tokens", [0, 1, 17, 63, 1000])
def test_op_is_the_float_product(tokens: int, in_features: int, out_features: int, groups: int) -> None:
    weight, scale, dense = random_weight(out_features, in_features, groups)
    x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
    found = torch.ops.qpcompile.linear_w4a16(x, weight, scale, bias)
    torch.testing.assert_close(found, (x.double() @ dense.T + bias).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, cpu.FEW_ROWS + 1])
def test_half_types_are_multiplied_in_float32(dtype: torch.dtype, tokens: int) -> None:
    weight, scale, dense = random_weight(7, 96)
    x, bias = torch.randn(1, tokens, 96).to(dtype), torch.randn(7).to(dtype)
    found = torch.ops.qpcompile.linear_w4a16(x, weight, scale, bias)
    assert found.dtype == dtype
    expected, size = x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T
    # Many bfloat16 rows meet a weight that is rounded to bfloat16.
    assert ((found.double() - expected).abs() <= UNITS[dtype] * (expected.abs() + size) + 1e-5).all()


@levels
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_in_c(shape: tuple[int, int, int, int], dtype: torch.dtype, biased: bool, level: int) -> None:
    tokens, columns, features, groups = shape
    weight, scale, dense = random_weight(features, columns, groups)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(features).to(dtype) if biased else None
    y = cpu._native(x, weight, scale, bias, level)
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=UNITS[dtype], atol=1e-4)
    for row in range(tokens):
        assert torch.equal(y[row : row + 1], cpu._native(x[row : row + 1], weight, scale, bias, level))


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_dequantized_in_c_is_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, level: int) -> None:
    _, columns, features, groups = shape
    weight, scale, _ = random_weight(features, columns, groups)
    expected = reference.dequantize_weight(weight, columns, scale).to(dtype)
    assert torch.equal(cpu.dequantized(weight, columns, scale, dtype, level), expected)


@levels
@pytest.mark.parametrize("columns", [35, 512])
def test_every_code_in_every_place(columns: int, level: int) -> None:
    codes = torch.arange(-8, 8).to(torch.int8)[:, None].repeat(1, columns)
    y = cpu._native(torch.eye(columns), pack_int4(codes), torch.ones(16, 1), None, level)
    assert torch.equal(y, torch.arange(-8.0, 8.0).expand(columns, -1))


@levels
def test_what_is_not_finite(level: int) -> None:
    x, codes = torch.ones(2, 40).bfloat16(), torch.ones(3, 40, dtype=torch.int8)
    x[0, 7], x[1, 39] = torch.inf, torch.nan
    y = cpu._native(x, pack_int4(codes), torch.tensor([[1.0], [torch.nan], [2.0]]), None, level)
    assert y[0].tolist()[::2] == [torch.inf, torch.inf] and y[:, 1].isnan().all() and y[1].isnan().all()


@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
@pytest.mark.usefixtures("two_threads")
def test_threads_give_the_same_bits() -> None:
    weight, scale, _ = random_weight(700, 1024, 8)
    x = torch.randn(3, 1024).bfloat16()
    two, dense = cpu._native(x, weight, scale, None), cpu.dequantized(weight, 1024, scale)
    torch.set_num_threads(1)
    assert torch.equal(two, cpu._native(x, weight, scale, None))
    assert torch.equal(dense, cpu.dequantized(weight, 1024, scale))


def test_many_rows_are_multiplied_by_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHANNELS", 8)
    weight, scale, _ = random_weight(19, 96, 3)
    for bias in (None, torch.randn(19)):
        x = torch.randn(cpu.FEW_ROWS + 1, 96)
        expected = reference.linear_w4a16(x, weight, scale, bias)
        torch.testing.assert_close(cpu.linear_w4a16(x, weight, scale, bias), expected, rtol=1e-5, atol=1e-5)


def test_non_contiguous() -> None:
    weight, scale, _ = random_weight(14, 96)
    x = torch.randn(96, 5).T
    found = torch.ops.qpcompile.linear_w4a16(x, weight[::2], scale[::2], None)
    expected = reference.linear_w4a16(x.contiguous(), weight, scale, None)[:, ::2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["plain", "bias"])
def test_opcheck(bias: Tensor | None) -> None:
    weight, scale, _ = random_weight(7, 33, 3)
    torch.library.opcheck(op.linear_w4a16, (torch.randn(2, 3, 33), weight, scale, bias))


def test_refuses_groups_that_do_not_divide() -> None:
    weight, _, _ = random_weight(7, 32)
    with pytest.raises(KernelError, match="K is 32, Gw is 3"):
        torch.ops.qpcompile.linear_w4a16(torch.zeros(1, 32), weight, torch.ones(7, 3), None)


class FloatLayers(torch.nn.Module):
    """A layer per channel in float and in half, and one per group with a bias."""

    def __init__(self) -> None:
        super().__init__()
        for name, groups in (("channel", 1), ("group", 3)):
            weight, scale, _ = random_weight(7, 96, groups, seed=groups)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)
        self.bias = torch.nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = torch.ops.qpcompile.linear_w4a16
        return (
            linear(x, self.channel, self.channel_scale, None),
            linear(x, self.group, self.group_scale, self.bias),
            linear(x.half(), self.channel, self.channel_scale, self.bias),
        )


def test_onnx_stores_4_bits_and_is_the_op(export_onnx: Any) -> None:
    module = FloatLayers()
    exported = export_onnx(
        module,
        [torch.randn(2, 5, 96)],
        {op.OVERLOAD: translation.linear_w4a16},
        [translation.lower],
        {"session.qdq_matmulnbits_accuracy_level": "0"},
    )
    assert not any("::" in each for each in exported.operators)
    assert sorted(exported.initializers_of(onnx.TensorProto.INT4)) == [(96, 7), (96, 7)]
    assert not exported.initializers_of(onnx.TensorProto.UINT8)
    for shape in ((1, 1, 96), (3, 17, 96)):
        x = torch.randn(shape)
        found, expected = exported(x), module(x)
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        torch.testing.assert_close(found[:2], list(expected[:2]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], rtol=2e-3, atol=2e-3)
