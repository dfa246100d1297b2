"""qpcompile::linear_int: the packing, exact integer products on every shape, the scaling, ONNX with 4-bit weights."""

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import ExportError, KernelError
from qpcompile.kernels.linear_int import cpu, op, reference
from qpcompile.kernels.linear_int import onnx as translation
from qpcompile.kernels.linear_int.packing import (
    codes_of,
    pack_int4,
    packed_width,
    plane_width,
    stored_codes,
    unpack_int4,
)
from qpcompile.kernels.quantize_dynamic.onnx import quantize_dynamic
from qpcompile.kernels.quantize_dynamic.op import OVERLOAD as QUANTIZE
from qpcompile.kernels.quantize_dynamic.reference import code_range

BITS = ((4, 4), (8, 4), (8, 8))
"""Of activations and weights."""


def random_codes(*shape: int, seed: int = 0, bits: int = 4) -> Tensor:
    """i8[shape] over the whole range of `bits` bits."""
    lowest, highest = code_range(bits)
    return torch.randint(lowest, highest + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_floats(*shape: int, seed: int = 0) -> Tensor:
    """f32[shape] in [0.5, 1.5)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_packing_by_hand() -> None:
    # K = 5: planes of 3, the sixth code is padding. Low nibbles carry q + 8, high nibbles two's complement.
    packed = pack_int4(torch.tensor([[-8, 0, 7, -1, 3]], dtype=torch.int8))
    assert packed.tolist() == [[0xF0, 0x38, 0x0F]]


def test_packing_in_blocks_of_256() -> None:
    q = random_codes(2, 512)
    packed = pack_int4(q)
    assert torch.equal((packed[:, 128:] & 15).to(torch.int8) - 8, q[:, 256:384])
    assert torch.equal(packed[:, 128:].view(torch.int8) >> 4, q[:, 384:])


@given(rows=st.integers(0, 5), in_features=st.sampled_from([1, 2, 3, 31, 64, 144, 255, 256, 257, 768]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_packing_round_trip(rows: int, in_features: int, data: st.DataObject) -> None:
    q = random_codes(rows, in_features, seed=data.draw(st.integers(0, 2**31)))
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(in_features))
    assert packed_width(in_features) % plane_width(in_features) == 0
    assert torch.equal(unpack_int4(packed, in_features), q)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9))
@settings(deadline=None)
def test_every_byte_matters(codes: list[int]) -> None:
    q = torch.tensor([codes], dtype=torch.int8)
    other = q.clone()
    other[0, -1] = -8 if codes[-1] == 7 else codes[-1] + 1
    assert not torch.equal(pack_int4(q), pack_int4(other))


def test_unpack_takes_a_strided_weight() -> None:
    packed = pack_int4(random_codes(6, 34))
    assert torch.equal(unpack_int4(packed[::2], 34), unpack_int4(packed, 34)[::2])


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(KernelError, match="codes from -9 to 0 do not fit"):
        pack_int4(torch.tensor([[-9, 0]], dtype=torch.int8))


def test_8_bit_codes_are_stored_as_they_are() -> None:
    q = random_codes(3, 7, bits=8)
    assert stored_codes(q, 8) is q and codes_of(q, 7) is q
    assert torch.equal(codes_of(stored_codes(q.clamp(-8, 7), 4), 7), q.clamp(-8, 7))


def test_by_hand() -> None:
    q = torch.tensor([[1, 2, 3, -4], [-8, 7, 0, 1]], dtype=torch.int8)
    weight = pack_int4(torch.tensor([[1, -1, 0, 2], [-8, -8, 7, 7]], dtype=torch.int8))
    scale, weight_scale = torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0], [0.25]])
    y = reference.linear_int(q, scale, weight, weight_scale, torch.tensor([10.0, 0.0]), torch.float32)
    # Sums: row 0 gives -9 and -31, row 1 gives -13 and 15.
    assert y.tolist() == [[10 - 4.5, -31 * 0.5 * 0.25], [10 - 26.0, 15 * 2 * 0.25]]


def test_8_bits_by_hand() -> None:
    q = torch.tensor([[100, -128, 3], [127, 127, 127]], dtype=torch.int8)
    weight, scale = torch.tensor([[-128, 127, 0], [127, 127, 127]], dtype=torch.int8), torch.tensor([[0.5], [1.0]])
    y = torch.ops.qpcompile.linear_int(q, scale, weight, torch.ones(2, 1), None, torch.float32, 8)
    assert y.tolist() == [[-29056 * 0.5, -3175 * 0.5], [-127.0, 3 * 127.0 * 127]]


def test_groups_by_hand() -> None:
    q = torch.tensor([[1, 2, 3, -4]], dtype=torch.int8)
    weight = pack_int4(torch.tensor([[1, -1, 0, 2]], dtype=torch.int8))
    y = reference.linear_int(q, torch.tensor([[2.0, 0.5]]), weight, torch.tensor([[1.0, 3.0]]), None, torch.float32)
    assert y.tolist() == [[-1 * 2.0 - 8 * 0.5 * 3.0]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 17, 63, 1000])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 5), (17, 3), (96, 33), (255, 1), (2100, 65)])
def test_integer_product_is_exact(tokens: int, in_features: int, out_features: int, bits: int) -> None:
    q, codes = random_codes(tokens, in_features, bits=8), random_codes(out_features, in_features, seed=1, bits=bits)
    expected = reference.integer_product(q, codes)
    found = cpu.integer_product(q, codes)
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


def test_integer_product_of_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    for vnni in {False, torch.cpu._is_vnni_supported()}:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        for lowest in (-8, -128):
            q, codes = (torch.full((rows, 4096), lowest, dtype=torch.int8) for rows in (17, 40))
            expected = torch.full((17, 40), lowest**2 * 4096, dtype=torch.int32)
            assert torch.equal(cpu.integer_product(q, codes), expected)


@pytest.mark.parametrize("stride", [0, 1, 999])
def test_integer_product_with_the_stride_of_a_single_token(stride: int) -> None:
    q, codes = random_codes(1, 64), random_codes(5, 64, seed=1)
    assert torch.equal(cpu.integer_product(q.as_strided((1, 64), (stride, 1)), codes), cpu.integer_product(q, codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("shape", [(1, 1, 33), (2, 17, 96), (63, 33), (33,)], ids=str)
def test_op_is_the_reference(shape: tuple[int, ...], groups: int, weight_groups: int, dtype: torch.dtype) -> None:
    scale, weight_scale = random_floats(*shape[:-1], groups), random_floats(7, weight_groups, seed=1)
    bias = random_floats(7, seed=2).to(dtype)
    for bits, weight_bits in BITS:
        q = random_codes(*shape, bits=bits)
        weight = stored_codes(random_codes(7, shape[-1], seed=1, bits=weight_bits), weight_bits)
        found = torch.ops.qpcompile.linear_int(q, scale, weight, weight_scale, bias, dtype, bits)
        expected = reference.linear_int(q, scale, weight, weight_scale, bias, dtype)
        assert found.dtype == dtype and found.shape == (*shape[:-1], 7)
        assert torch.equal(found, expected)


# Two roundings, each with an error of step / sqrt(12) where the step is about 3 sigma / 7 or / 127.
@pytest.mark.parametrize(("bits", "weight_bits", "most"), [(4, 4, 0.22), (8, 4, 0.15), (8, 8, 0.012)])
def test_approximates_the_float_layer(bits: int, weight_bits: int, most: float) -> None:
    x, w = torch.randn(40, 256), torch.randn(30, 256)
    q, scale = torch.ops.qpcompile.quantize_dynamic(x, 0, 1.0, bits)
    codes, weight_scale = torch.ops.qpcompile.quantize_dynamic(w, 0, 1.0, weight_bits)
    weight = stored_codes(codes, weight_bits)
    y = torch.ops.qpcompile.linear_int(q, scale, weight, weight_scale, None, torch.float32, bits)
    assert (y - x @ w.T).norm() / (x @ w.T).norm() < most


def test_non_contiguous() -> None:
    q, scale = random_codes(96, 5).T, random_floats(10, 1)[::2]
    weight, weight_scale = pack_int4(random_codes(14, 96, seed=1))[::2], random_floats(1, 7).T
    found = torch.ops.qpcompile.linear_int(q, scale, weight, weight_scale, None, torch.float32, 8)
    q, scale, weight, weight_scale = (each.contiguous() for each in (q, scale, weight, weight_scale))
    assert torch.equal(found, reference.linear_int(q, scale, weight, weight_scale, None, torch.float32))


@pytest.mark.parametrize("residual", [None, torch.ones(2, 3, 7, dtype=torch.bfloat16)], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["plain", "bias"])
def test_opcheck(bias: Tensor | None, residual: Tensor | None) -> None:
    weight = pack_int4(random_codes(7, 33))
    arguments = (random_codes(2, 3, 33), random_floats(2, 3, 1), weight, random_floats(7, 1), bias, torch.bfloat16, 8)
    torch.library.opcheck(op.linear_int, (*arguments, residual))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7), torch.float32), ((2, 3, 7), torch.bfloat16)], ids=str)
def test_refuses_a_residual_of_another_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = random_codes(2, 3, 33), torch.ones(2, 3, 1), pack_int4(random_codes(7, 33)), torch.ones(7, 1), None
    with pytest.raises(KernelError, match=r"residual is .*, but must be =dtype\[..., N\]"):
        torch.ops.qpcompile.linear_int(*arguments, torch.float32, 8, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("weight", "weight_scale", "bias", "reason"),
    [
        (torch.zeros(4, 5, dtype=torch.uint8), torch.ones(4, 1), None, r"ceil\(K/2\) is 3 and not 5"),
        (torch.zeros(4, 3, dtype=torch.int8), torch.ones(4, 1), None, r"weight is i8\[4, 3\], but must be u8"),
        (torch.zeros(4, 3, dtype=torch.uint8), torch.ones(4, 3), None, "G is 2, Gw is 3"),
        (torch.zeros(4, 3, dtype=torch.uint8), torch.ones(4, 1), torch.ones(3), "N is 4 and not 3"),
    ],
)
def test_refuses_operands_that_do_not_fit(
    weight: Tensor, weight_scale: Tensor, bias: Tensor | None, reason: str
) -> None:
    with pytest.raises(KernelError, match=reason):
        torch.ops.qpcompile.linear_int(
            random_codes(2, 6), torch.ones(2, 2), weight, weight_scale, bias, torch.float32, 8
        )


class QuantizedLayers(torch.nn.Module):
    """Layers on the same activations: two that share a weight, one with a bias, groups, and 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shared", pack_int4(random_codes(10, 96, seed=1)))
        self.register_buffer("shared_scale", random_floats(10, 1, seed=1))
        self.register_buffer("other", pack_int4(random_codes(7, 96, seed=2)))
        self.register_buffer("other_scale", random_floats(7, 1, seed=2))
        self.register_buffer("grouped_scale", random_floats(7, 3, seed=3))
        self.register_buffer("wide", random_codes(7, 96, seed=5, bits=8))
        self.bias = torch.nn.Parameter(random_floats(7, seed=4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = torch.ops.qpcompile.linear_int
        q, scale = torch.ops.qpcompile.quantize_dynamic(x, 0, 1.0, 4)
        q8, scale8 = torch.ops.qpcompile.quantize_dynamic(x, 0, 0.9, 8)
        grouped, group_scale = torch.ops.qpcompile.quantize_dynamic(x, 32, 1.0, 4)
        return (
            linear(q, scale, self.shared, self.shared_scale, None, torch.float32, 4),
            linear(q, scale, self.shared, self.shared_scale, None, torch.float16, 4),
            linear(q, scale, self.other, self.other_scale, self.bias, torch.float32, 4),
            linear(q8, scale8, self.other, self.other_scale, self.bias, torch.float32, 8),
            linear(q8, scale8, self.wide, self.other_scale, self.bias, torch.float32, 8),
            linear(q, scale, self.other, self.grouped_scale, self.bias, torch.float32, 4),
            linear(grouped, group_scale, self.other, self.grouped_scale, None, torch.float32, 4),
            linear(q8, scale8, self.wide, self.grouped_scale, None, torch.float32, 8),
        )


def test_onnx_stores_the_weights_small_and_gives_the_same_bits(export_onnx: Any) -> None:
    module = QuantizedLayers()
    translations = {op.OVERLOAD: translation.linear_int, QUANTIZE: quantize_dynamic}
    exported = export_onnx(module, [torch.randn(2, 5, 96)], translations, [translation.lower])
    assert not any("::" in each for each in exported.operators)
    assert "MatMulInteger" in exported.operators
    assert sorted(exported.initializers_of(onnx.TensorProto.INT4)) == [(96, 7), (96, 10)]
    assert exported.initializers_of(onnx.TensorProto.UINT8) == [(96, 7)]
    for shape in ((1, 1, 96), (3, 17, 96)):
        x = torch.randn(shape)
        found, expected = exported(x), module(x)
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        assert all(torch.equal(left, right) for left, right in zip(found[:5], expected[:5], strict=True))
        # The results of the groups may be added in a different order.
        torch.testing.assert_close(found[5:7], list(expected[5:7]), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(found[7], expected[7], rtol=1e-5, atol=1e-1)


def placeholder_model(opset: int) -> ir.Model:
    """One LinearInt whose weight is an input of the graph."""
    inputs = [ir.Value(name=each) for each in ("q", "scale", "weight", "weight_scale")]
    attributes = {"in_features": 8, "groups": 1, "scale_groups": 1, "rank": 2, "dtype": 1, "bits": 4}
    node = ir.node("LinearInt", inputs, attributes, domain="qpcompile", name="projection")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset, "qpcompile": 1})
    return ir.Model(graph, ir_version=10)


def test_lower_refuses_a_weight_without_data() -> None:
    with pytest.raises(ExportError, match=r"input 2 of LinearInt has no data(.|\n)*node projection"):
        translation.lower(placeholder_model(21))


def test_lower_refuses_an_opset_without_4_bit_integers() -> None:
    with pytest.raises(ExportError, match="opset 20 has no 4-bit integers"):
        translation.lower(placeholder_model(20))
