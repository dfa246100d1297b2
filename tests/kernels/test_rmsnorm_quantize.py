"""qpcompile::rmsnorm_quantize: by hand, equal to the composition of its parts bit for bit, and in ONNX."""

from typing import Any

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from kernels.epilogues import CHANGES, Transforms, arguments_of, check_onnx, epilogue_of
from torch import Tensor

from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.rmsnorm_quantize import cpu, op, reference
from qpcompile.kernels.rmsnorm_quantize import onnx as translation
from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue


def test_by_hand() -> None:
    # Mean square 4 and weight 7 / 2 first: y = 7 x / 4, whose maximum is 7.
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0], [4.0, 0.0, 0.0, 0.0]])
    q, scale = reference.rmsnorm_quantize(x, torch.tensor([7.0, 1.0, 3.0, 2.0]), 0.0, *arguments_of(Epilogue()))
    assert q.tolist() == [[7, -1, 3, -2], [7, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [False, True], ids=["", "scaled and shifted"])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(1, 63, 0), (17, 144, 36), (63, 96, 0), (1000, 33, 3)])
def test_op_is_the_composition(
    tokens: int, channels: int, group_size: int, more: bool, change: str, dtype: torch.dtype
) -> None:
    x = (torch.randn(tokens, channels) * 5).to(dtype)
    x[:1] = 0
    weight = torch.randn(channels).to(dtype)
    norm = reference.rmsnorm(x, weight, 1e-5)
    end = epilogue_of(channels, change, scaled=more, shifted=more, group_size=group_size)
    values = end.transformed(norm, wide_type(x))
    found = torch.ops.qpcompile.rmsnorm_quantize(x, weight, 1e-5, *arguments_of(end))
    expected = quantize_dynamic(values, group_size, 0.9)
    if dtype == torch.float64:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    else:
        # Sums in float32, which depend on the summation order.
        assert_codes_agree(found, expected, values, tiles=change != "none" and native.library().amx)


def test_norm_is_torchs() -> None:
    x, weight = torch.randn(5, 63), torch.randn(63)
    expected = torch.nn.functional.rms_norm(x, (63,), weight, 1e-5)
    torch.testing.assert_close(cpu.rmsnorm(x, weight, 1e-5), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(cpu.rmsnorm(x, weight, 1e-5), reference.rmsnorm(x, weight, 1e-5))


def test_a_token_is_the_same_in_every_batch() -> None:
    x, weight = torch.randn(33, 768), torch.randn(768)
    arguments = (weight, 1e-5, *arguments_of(Epilogue(rotate=True)))
    together = torch.ops.qpcompile.rmsnorm_quantize(x, *arguments)
    alone = [torch.ops.qpcompile.rmsnorm_quantize(each, *arguments) for each in x.split(1)]
    assert torch.equal(together[0], torch.cat([q for q, _ in alone]))
    assert torch.equal(together[1], torch.cat([scale for _, scale in alone]))


def test_non_contiguous_and_untouched() -> None:
    x, weight = torch.randn(48, 5, 2).transpose(0, 2).double(), torch.randn(96)[::2]
    before = x.clone()
    found = torch.ops.qpcompile.rmsnorm_quantize(x, weight, 1e-5, *arguments_of(Epilogue()))
    expected = reference.rmsnorm_quantize(x.contiguous(), weight.contiguous(), 1e-5, *arguments_of(Epilogue()))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(x, before)


@pytest.mark.parametrize("change", CHANGES)
def test_opcheck(change: str) -> None:
    end = arguments_of(epilogue_of(12, change, scaled=True, shifted=True, group_size=4))
    torch.library.opcheck(op.rmsnorm_quantize, (torch.randn(2, 3, 12), torch.randn(12), 1e-5, *end))


class Norms(Transforms):
    """With every epilogue."""

    def __init__(self) -> None:
        super().__init__(op.OVERLOAD, 1e-5)
        self.weight = torch.nn.Parameter(torch.randn(144))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.results(x, self.weight)


def test_onnx_is_the_op(export_onnx: Any) -> None:
    check_onnx(export_onnx, Norms(), {op.OVERLOAD: translation.rmsnorm_quantize})
