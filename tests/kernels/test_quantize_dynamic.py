"""qpcompile::quantize_dynamic: codes and scales by hand, in awkward shapes, at the limits of the codes, and in ONNX."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.quantize_dynamic import onnx as translation
from qpcompile.kernels.quantize_dynamic import op, reference


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Codes and scales are equal bit for bit, NaN included."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


def test_by_hand() -> None:
    x = torch.tensor([[0.7, -0.35, 0.0, 0.14], [-14.0, 3.0, 1.0, 5.0]])
    q, scale = reference.quantize_dynamic(x)
    torch.testing.assert_close(scale, torch.tensor([[0.1], [2.0]]))
    # 3 / 2 and 5 / 2 and 1 / 2 are ties: to even.
    assert q.tolist() == [[7, -4, 0, 1], [-7, 2, 0, 2]]


def test_groups_by_hand() -> None:
    x = torch.tensor([[7.0, -3.0, 70.0, 20.0], [0.0, 0.0, -7.0, 1.0]])
    q, scale = reference.quantize_dynamic(x, group_size=2)
    assert q.tolist() == [[7, -3, 7, 2], [0, 0, -7, 1]]
    assert scale.tolist() == [[1.0, 10.0], [1.0, 1.0]]


def test_clipping_saturates_at_both_ends() -> None:
    q, scale = torch.ops.qpcompile.quantize_dynamic(torch.tensor([[14.0, -14.0, 2.0, -8.4]]), 0, 0.5, 4)
    assert scale.tolist() == [[1.0]]
    assert q.tolist() == [[7, -8, 2, -8]]


def test_8_bits_by_hand() -> None:
    q, scale = torch.ops.qpcompile.quantize_dynamic(torch.tensor([[254.0, -254.0, 3.0, 200.0, -200.0]]), 0, 1.0, 8)
    assert scale.tolist() == [[2.0]] and q.tolist() == [[127, -127, 2, 100, -100]]
    q, scale = torch.ops.qpcompile.quantize_dynamic(torch.tensor([[254.0, -254.0, 3.0, 200.0, -200.0]]), 0, 0.5, 8)
    assert scale.tolist() == [[1.0]] and q.tolist() == [[127, -128, 3, 127, -128]]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.floats(0.5, 1.0), st.sampled_from([4, 8]))
@settings(max_examples=60, deadline=None)
def test_codes_are_in_range_and_near(values: list[float], clip: float, bits: int) -> None:
    x, (lowest, highest) = torch.tensor([values]), reference.code_range(bits)
    q, scale = torch.ops.qpcompile.quantize_dynamic(x, 0, clip, bits)
    assert q.dtype == torch.int8 and int(q.min()) >= lowest and int(q.max()) <= highest
    inside = (x / scale >= lowest) & (x / scale <= highest)
    error = (q * scale - x).abs()
    assert torch.all(error[inside] <= (scale / 2 * (1 + 1e-5)).expand_as(error)[inside])
    assert torch.all(q[~inside] == torch.where(x > 0, highest, lowest)[~inside])


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_refuses_other_bits(bits: int) -> None:
    with pytest.raises(KernelError, match=r"bits is .*, but must be one of 4, 8"):
        torch.ops.qpcompile.quantize_dynamic(torch.zeros(1, 16), 0, 1.0, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"),
    [(1, 1, 0), (17, 63, 0), (63, 63, 9), (1000, 130, 0), (17, 256, 32), (0, 8, 4)],
)
def test_op_is_the_reference(tokens: int, channels: int, group_size: int, dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:1] = 0
    found = torch.ops.qpcompile.quantize_dynamic(x, group_size, 0.9, bits)
    assert_same(found, reference.quantize_dynamic(x, group_size, 0.9, bits))
    assert found[1].shape == (tokens, channels // group_size if group_size else 1)


def test_reconstruction_is_within_half_a_step() -> None:
    x = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(1))
    q, scale = torch.ops.qpcompile.quantize_dynamic(x, 16, 1.0, 4)
    error = (reference.dequantize(q, scale) - x).abs().unflatten(-1, (3, 16)).amax(-1)
    assert torch.all(error <= scale * 0.5 * (1 + 1e-5))


def test_zero_and_tiny_tokens_have_a_finite_scale() -> None:
    x = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [1e-38, 3e-39]])
    q, scale = torch.ops.qpcompile.quantize_dynamic(x, 0, 1.0, 4)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert q[0].tolist() == [0, 0] and q[2].tolist() == [7, 2]


def test_a_poisoned_token_stays_poisoned() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    _, scale = torch.ops.qpcompile.quantize_dynamic(x, 0, 1.0, 4)
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_non_contiguous() -> None:
    x = torch.randn(12, 5, 9).transpose(0, 2)
    found = torch.ops.qpcompile.quantize_dynamic(x, 3, 1.0, 4)
    assert_same(found, reference.quantize_dynamic(x.contiguous(), 3, 1.0))


@pytest.mark.parametrize("group_size", [0, 8])
def test_opcheck(group_size: int) -> None:
    torch.library.opcheck(op.quantize_dynamic, (torch.randn(2, 3, 16), group_size, 0.95, 8))


@pytest.mark.parametrize("group_size", [3, -1, 32])
def test_refuses_groups_that_do_not_divide(group_size: int) -> None:
    with pytest.raises(KernelError, match="operand group_size"):
        torch.ops.qpcompile.quantize_dynamic(torch.zeros(1, 16), group_size, 1.0, 4)


class QuantizeTwice(torch.nn.Module):
    """Both granularities and both widths in one graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            *torch.ops.qpcompile.quantize_dynamic(x, 0, 0.9, 4),
            *torch.ops.qpcompile.quantize_dynamic(x, 6, 1.0, 4),
        )


def test_onnx_gives_the_same_bits(export_onnx: Any) -> None:
    exported = export_onnx(QuantizeTwice(), [torch.randn(2, 5, 18)], {op.OVERLOAD: translation.quantize_dynamic})
    assert not any("::" in each for each in exported.operators)
    for shape in ((1, 1, 18), (3, 17, 18), (1, 63, 18)):
        x = torch.randn(shape) * 10
        x[:, :1] = 0
        for found, expected in zip(exported(x), QuantizeTwice()(x), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
