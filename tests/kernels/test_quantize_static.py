"""quantize_static against its formula, and against the dynamic operator at the dynamic operator's own scale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.quantize_dynamic.op import quantize_dynamic
from qpcompile.kernels.quantize_static.onnx import quantize_static as translation
from qpcompile.kernels.quantize_static.op import OVERLOAD, quantize_static


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    codes, scale = quantize_static(torch.tensor([[0.24, -0.26, 9.0, -9.0]]), torch.tensor([0.5]), 4)
    assert codes.tolist() == [[0, -1, 7, -8]] and scale.tolist() == [[0.5]]
    codes, _ = quantize_static(torch.tensor([[0.24, -0.26, 63.4, 90.0, -90.0]]), torch.tensor([0.5]), 8)
    assert codes.tolist() == [[0, -1, 127, 127, -128]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 48), (2, 0, 8)], ids=str)
def test_equals_dynamic_at_its_scale(shape: tuple[int, ...], bits: int) -> None:
    x = made(*shape)
    codes, scale = quantize_dynamic(x, 0, 1.0, bits)
    fixed = quantize_static(x, scale, bits)
    assert torch.equal(fixed[0], codes) and torch.equal(fixed[1], scale)


def test_one_scale_is_spread_over_tokens() -> None:
    _, scale = quantize_static(made(2, 5, 8), torch.tensor([0.3]), 4)
    assert scale.shape == (2, 5, 1) and scale.is_contiguous() and (scale == 0.3).all()


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(2, 5, 8), torch.ones(1, dtype=torch.float64)])
def test_refuses_a_scale_that_does_not_fit(scale: torch.Tensor) -> None:
    with pytest.raises(KernelError, match="operand scale"):
        quantize_static(made(2, 5, 8), scale, 4)


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(OVERLOAD, (made(2, 3, 8), torch.tensor([0.3]), 4))
    torch.library.opcheck(OVERLOAD, (made(2, 3, 8), torch.full((2, 3, 1), 0.3), 8))


def test_onnx(export_onnx: Callable[..., Any]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.ops.qpcompile.quantize_static(x, torch.tensor([0.3]), 4)

    exported, x = export_onnx(Model(), [made(2, 5, 8)], {OVERLOAD: translation}), made(3, 4, 8)
    for got, expected in zip(exported(x), Model()(x), strict=True):
        assert torch.equal(got, expected)
