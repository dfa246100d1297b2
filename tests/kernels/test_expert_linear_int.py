"""expert_linear_int and expert_linear_a16: exact products per expert on every path, in torch, C and ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.expert_linear_a16 import reference as float_reference
from qpcompile.kernels.expert_linear_a16.op import OVERLOAD as EXPERT_LINEAR_A16
from qpcompile.kernels.expert_linear_a16.op import expert_linear_a16
from qpcompile.kernels.expert_linear_int import cpu, reference
from qpcompile.kernels.expert_linear_int.op import OVERLOAD, expert_linear_int
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_dynamic.op import OVERLOAD as QUANTIZE_DYNAMIC
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic

# Tokens, rows per token, slots per token, experts, outputs, channels, groups of inputs and of weights.
SHAPES = [
    (5, 1, 2, 4, 6, 12, 1, 1),
    (7, 3, 3, 5, 3, 7, 1, 1),
    (4, 2, 4, 3, 65, 8, 2, 2),
    (30, 1, 4, 3, 33, 256, 1, 4),
    (9, 2, 2, 70, 5, 96, 3, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 1, 2, 4, 6, 12, 1, 1),
]
BITS = [(4, 4), (8, 4), (8, 8), (4, 8)]
"""Of activations and of weights."""


def weights(experts: int, outputs: int, channels: int, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(channels)
    dense = torch.randn(experts * outputs, channels, generator=made)
    codes, scale = quantize_dynamic(dense, channels // groups, 1.0, bits)
    return stored_codes(codes, bits).unflatten(0, (experts, outputs)), scale.unflatten(0, (experts, outputs))


def case(shape: tuple[int, ...], bits: int, weight_bits: int) -> tuple[Any, ...]:
    """The first operands of expert_linear_int."""
    tokens, rows, slots, experts, outputs, channels, groups, weight_groups = shape
    made = torch.Generator().manual_seed(tokens)
    q, scale = quantize_dynamic(torch.randn(tokens, rows, channels, generator=made), channels // groups, 1.0, bits)
    index = torch.randint(0, experts, (tokens, slots), generator=made)
    return q, scale, *weights(experts, outputs, channels, weight_groups, weight_bits), index


def test_written_out() -> None:
    q = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int8)
    weight = torch.tensor([[[1, 0]], [[0, 10]]], dtype=torch.int8)
    operands = q, torch.tensor([[[1.0]], [[0.5]]]), weight, torch.tensor([[[1.0]], [[2.0]]])
    index = torch.tensor([[1, 0], [0, 0]])
    assert expert_linear_int(*operands, index, torch.float32, 8).tolist() == [[[40.0], [1.0]], [[1.5], [1.5]]]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("bits", "weight_bits"), BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_paths_equal_the_reference(shape: tuple[int, ...], bits: int, weight_bits: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operands: tuple[Any, ...] = (*case(shape, bits, weight_bits), dtype)
        expected = reference.expert_linear_int(*operands)
        assert torch.equal(expert_linear_int(*operands, bits), expected)
        if native.available() and shape[0]:
            for level in range(native.library().level + 1):
                assert torch.equal(cpu._in_c(*operands, level=level), expected)


@pytest.mark.usefixtures("poison")
def test_many_slots_equal_the_reference() -> None:
    """More than one C call takes; operands that are not contiguous, and an index of 32 bits."""
    q, scale, weight, weight_scale, index = case((80, 2, 4, 6, 40, 130, 1, 1), 8, 4)
    assert index.numel() > cpu.FEW_SLOTS
    expected = reference.expert_linear_int(q, scale, weight, weight_scale, index, torch.float32)
    turned = q.transpose(0, 2).contiguous().transpose(0, 2), scale, weight, weight_scale, index.int()
    assert torch.equal(expert_linear_int(*turned, torch.float32, 8), expected)
    few = *(each[:3] for each in turned[:2]), weight, weight_scale, index[:3].int()
    assert torch.equal(expert_linear_int(*few, torch.float32, 8), expected[:3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_float_activations_equal_the_reference(shape: tuple[int, ...], weight_bits: int) -> None:
    tokens, rows, _, _, _, channels, *_ = shape
    weight, weight_scale, index = case(shape, 8, weight_bits)[2:]
    x = torch.randn(tokens, rows, channels)
    expected = float_reference.expert_linear_a16(x, weight, weight_scale, index)
    torch.testing.assert_close(expert_linear_a16(x, weight, weight_scale, index), expected, rtol=1e-5, atol=5e-5)
    half = expert_linear_a16(x.bfloat16(), weight, weight_scale, index)
    assert (half.float() - expected).norm() <= 1e-2 * expected.norm()


def test_an_expert_that_does_not_exist_is_refused() -> None:
    for tokens in (5, 50):  # by the path of few slots, and of many
        q, scale, weight, weight_scale, index = case((tokens, 1, 2, 4, 6, 12, 1, 1), 8, 4)
        for wrong in (4, -1, 2**40):
            index[2, 1] = wrong
            with pytest.raises(KernelError, match=f"expert {wrong} of 4"):
                expert_linear_int(q, scale, weight, weight_scale, index, torch.float32, 8)
            with pytest.raises(KernelError, match=f"expert {wrong} of 4"):
                expert_linear_a16(q.float(), weight, weight_scale, index)


@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
@pytest.mark.parametrize("wrong", [4, -1, 2**62])
def test_c_trusts_no_index(wrong: int) -> None:
    q, scale, weight, weight_scale, index = case(SHAPES[0], 8, 4)
    index[2, 1] = wrong
    y = torch.zeros(5, 2, 6)
    for level in range(native.library().level + 1):
        with pytest.raises(KernelError, match="qp_expert_linear_int: index"):
            native.call(
                "expert_linear_int", q, scale, weight, weight_scale, index, y, 5, 1, 2, 4, 12, 6, 1, 1, level=level
            )
    assert not y.any()


def test_operands_that_do_not_match_are_refused() -> None:
    q, scale, weight, weight_scale, index = case(SHAPES[0], 8, 4)
    call = expert_linear_int
    with pytest.raises(KernelError, match="J must be a multiple of I"):
        call(q.expand(-1, 2, -1), scale.expand(-1, 2, -1), weight, weight_scale, index[:, :1], torch.float32, 8)
    with pytest.raises(KernelError, match="operand weight_scale"):
        call(q, scale, weight, weight_scale[:3], index, torch.float32, 8)
    with pytest.raises(KernelError, match="operand weight"):
        call(q, scale, weight[..., :5], weight_scale, index, torch.float32, 8)
    with pytest.raises(KernelError, match="operand index"):
        call(q, scale, weight, weight_scale, index.float(), torch.float32, 8)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_opcheck(weight_bits: int) -> None:
    q, scale, *rest = case(SHAPES[1], 8, weight_bits)
    torch.library.opcheck(expert_linear_int, (q, scale, *rest, torch.bfloat16, 8))
    torch.library.opcheck(expert_linear_a16, (torch.randn(q.shape), *rest))


class _Layers(torch.nn.Module):
    """Experts of tokens in rows, as a layer flattens them: one row per token, and one per slot; 4 and 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        made = {"first": (6, 24, 1, 4), "second": (8, 6, 1, 4), "grouped": (5, 24, 3, 4), "wide": (5, 24, 1, 8)}
        for name, (outputs, channels, groups, bits) in made.items():
            weight, scale = weights(4, outputs, channels, groups, bits)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        rows, chosen = x.flatten(0, 1).unsqueeze(1), index.flatten(0, 1)
        q, scale = QUANTIZE_DYNAMIC(rows, 0, 1.0, 8)
        y = OVERLOAD(q, scale, self.first, self.first_scale, chosen, x.dtype, 8)
        inner = QUANTIZE_DYNAMIC(y, 0, 1.0, 4)
        return (
            y,
            OVERLOAD(*inner, self.second, self.second_scale, chosen, x.dtype, 4),
            OVERLOAD(q, scale, self.wide, self.wide_scale, chosen, x.dtype, 8),
            OVERLOAD(q, scale, self.grouped, self.grouped_scale, chosen, x.dtype, 8),
            EXPERT_LINEAR_A16(rows, self.grouped, self.grouped_scale, chosen),
            EXPERT_LINEAR_A16(rows, self.wide, self.wide_scale, chosen),
        )


def test_onnx_stores_the_weights_small_and_gives_the_same_bits(export_onnx: Any) -> None:
    import onnx

    from qpcompile.kernels.expert_linear.placeholder import split_experts
    from qpcompile.kernels.expert_linear_a16 import onnx as float_translation
    from qpcompile.kernels.expert_linear_int import onnx as translation
    from qpcompile.kernels.linear_int import onnx as linear
    from qpcompile.kernels.linear_w4a16 import onnx as float_linear
    from qpcompile.kernels.quantize_dynamic.onnx import quantize_dynamic as quantizer

    layers = _Layers()
    inputs = [
        (torch.randn(rows, tokens, 24), torch.randint(0, 4, (rows, tokens, 2))) for rows, tokens in ((2, 3), (1, 7))
    ]
    translations = {
        OVERLOAD: translation.expert_linear_int,
        EXPERT_LINEAR_A16: float_translation.expert_linear_a16,
        QUANTIZE_DYNAMIC: quantizer,
    }
    options = {"session.qdq_matmulnbits_accuracy_level": "0"}
    lowerings = [split_experts, linear.lower, float_linear.lower]
    exported = export_onnx(layers, inputs[0], translations, lowerings, options)
    assert not any("::" in each for each in exported.operators)
    assert exported.initializers_of(onnx.TensorProto.INT4).count((24, 6)) == 4
    for x, index in [*inputs, (inputs[0][0], torch.full((2, 3, 2), 3))]:
        found, expected = exported(x, index), layers(x, index)
        assert all(torch.equal(left, right) for left, right in zip(found[:3], expected[:3], strict=True))
        torch.testing.assert_close(found[3:], list(expected[3:]), rtol=1e-5, atol=1e-4)
