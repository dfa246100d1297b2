"""qpcompile::transform_quantize: by hand, equal to the composition of its parts bit for bit, and in ONNX."""

from typing import Any

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from kernels.epilogues import CHANGES, Transforms, arguments_of, check_onnx, epilogue_of

from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize import onnx as translation
from qpcompile.kernels.transform_quantize import op, reference


def test_by_hand() -> None:
    # Left exchanges the two halves, right the two channels of a half: [a b c d] becomes [d c b a].
    flip = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    x, scale, shift = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.full((4,), -3.0)
    q, step = reference.transform_quantize(x, scale, False, flip, flip, shift, 0, 1.0, 4)
    assert q.tolist() == [[7, 6, 5, 5]] and step.tolist() == [[1.0]]
    x = torch.tensor([[2.0, 7.0, -3.0, 14.0]])
    q, step = reference.transform_quantize(x, None, False, None, None, None, 2, 1.0, 4)
    assert q.tolist() == [[2, 7, -2, 7]] and step.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [False, True], ids=["", "scaled and shifted"])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(1, 63, 0), (17, 144, 36), (63, 96, 0), (1000, 33, 3)])
def test_op_is_the_composition(
    tokens: int, channels: int, group_size: int, more: bool, change: str, dtype: torch.dtype
) -> None:
    x = (torch.randn(tokens, channels) * 5).to(dtype)
    x[:1] = 0
    end = epilogue_of(channels, change, scaled=more, shifted=more, group_size=group_size)
    values = end.transformed(x.float(), wide_type(x))
    found = torch.ops.qpcompile.transform_quantize(x, *arguments_of(end))
    expected = quantize_dynamic(values, group_size, 0.9)
    if dtype == torch.float64:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    else:
        # Sums in float32, which depend on the summation order.
        assert_codes_agree(found, expected, values, tiles=change != "none" and native.library().amx)


def test_non_contiguous_and_untouched() -> None:
    x, end = torch.randn(48, 5, 2).transpose(0, 2).double(), epilogue_of(48, "factors", shifted=True)
    before = x.clone()
    found = torch.ops.qpcompile.transform_quantize(x, *arguments_of(end))
    expected = end.quantized(x.contiguous())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and torch.equal(x, before)


@pytest.mark.parametrize("change", CHANGES)
def test_opcheck(change: str) -> None:
    end = epilogue_of(12, change, scaled=True, shifted=True, group_size=4)
    torch.library.opcheck(op.transform_quantize, (torch.randn(2, 3, 12), *arguments_of(end)))


def test_onnx_is_the_op(export_onnx: Any) -> None:
    check_onnx(export_onnx, Transforms(op.OVERLOAD), {op.OVERLOAD: translation.transform_quantize})
