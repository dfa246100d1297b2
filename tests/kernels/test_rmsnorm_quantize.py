"""qpcompile::rmsnorm_quantize: by hand, equal to the composition of its parts bit for bit, and in ONNX."""

from typing import Any

import pytest
import torch
from kernels.code_agreement import assert_codes_agree
from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_int4.reference import quantize_int4
from qpcompile.kernels.rmsnorm_quantize import cpu, op, reference
from qpcompile.kernels.rmsnorm_quantize import onnx as translation
from qpcompile.kernels.sums import wide_type


def test_by_hand() -> None:
    # Mean square 4 and weight 7 / 2 first: y = 7 x / 4, whose maximum is 7.
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0], [4.0, 0.0, 0.0, 0.0]])
    q, scale = reference.rmsnorm_quantize(x, torch.tensor([7.0, 1.0, 3.0, 2.0]), 0.0, None, False, 0, 1.0)
    assert q.tolist() == [[7, -1, 3, -2], [7, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tokens", "channels", "group_size"), [(1, 63, 0), (17, 144, 36), (63, 96, 0), (1000, 33, 3)])
def test_op_is_the_composition(
    tokens: int, channels: int, group_size: int, scaled: bool, rotate: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(tokens, channels) * 5).to(dtype)
    x[:1] = 0
    weight, transform_scale = torch.randn(channels).to(dtype), torch.rand(channels) + 0.5
    norm = reference.rmsnorm(x, weight, 1e-5)
    scale_or_none = transform_scale if scaled else None
    values = transform(norm, scale_or_none, rotate, wide_type(x))
    found = torch.ops.qpcompile.rmsnorm_quantize(x, weight, 1e-5, scale_or_none, rotate, group_size, 0.9)
    expected = quantize_int4(values, group_size, 0.9)
    if dtype == torch.float32:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    else:
        # Sums in float32, which depend on the summation order.
        assert_codes_agree(found, expected, values, tiles=rotate and native.library().amx)


def test_norm_is_torchs() -> None:
    x, weight = torch.randn(5, 63), torch.randn(63)
    expected = torch.nn.functional.rms_norm(x, (63,), weight, 1e-5)
    torch.testing.assert_close(cpu.rmsnorm(x, weight, 1e-5), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(cpu.rmsnorm(x, weight, 1e-5), reference.rmsnorm(x, weight, 1e-5))


def test_a_token_is_the_same_in_every_batch() -> None:
    x, weight = torch.randn(33, 768), torch.randn(768)
    arguments = (weight, 1e-5, None, True, 0, 1.0)
    together = torch.ops.qpcompile.rmsnorm_quantize(x, *arguments)
    alone = [torch.ops.qpcompile.rmsnorm_quantize(each, *arguments) for each in x.split(1)]
    assert torch.equal(together[0], torch.cat([q for q, _ in alone]))
    assert torch.equal(together[1], torch.cat([scale for _, scale in alone]))


def test_non_contiguous_and_untouched() -> None:
    x, weight = torch.randn(48, 5, 2).transpose(0, 2), torch.randn(96)[::2]
    before = x.clone()
    found = torch.ops.qpcompile.rmsnorm_quantize(x, weight, 1e-5, None, False, 0, 1.0)
    expected = reference.rmsnorm_quantize(x.contiguous(), weight.contiguous(), 1e-5, None, False, 0, 1.0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(x, before)


@pytest.mark.parametrize("scale", [None, torch.ones(12)], ids=["plain", "scaled"])
def test_opcheck(scale: Tensor | None) -> None:
    arguments = (torch.randn(2, 3, 12), torch.randn(12), 1e-5, scale, scale is not None, 4, 0.95)
    torch.library.opcheck(op.rmsnorm_quantize, arguments)


class Norms(torch.nn.Module):
    """The plain form, and the one with everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(144))
        self.register_buffer("scale", torch.rand(144) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        norm = torch.ops.qpcompile.rmsnorm_quantize
        plain = norm(x, self.weight, 1e-5, None, False, 0, 1.0)
        return (*plain, *norm(x, self.weight, 1e-5, self.scale, True, 36, 0.9))


def test_onnx_is_the_op(export_onnx: Any) -> None:
    module = Norms()
    exported = export_onnx(module, [torch.randn(2, 5, 144)], {op.OVERLOAD: translation.rmsnorm_quantize})
    assert not any("::" in each for each in exported.operators)
    for shape in ((1, 1, 144), (3, 17, 144)):
        x = torch.randn(shape) * 5
        found, expected = exported(x), module(x)
        # Sums in float64, rounded once: the same codes in any summation order.
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
