"""rope against a formula written out here, on views as models pass them, and in ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.rope.op import OVERLOAD, rope

# Shapes of x and of its tables: a decoder's, a vision tower's, separate rows for each batch, a single element.
SHAPES = [
    ((2, 3, 17, 8), (1, 1, 17, 8)),
    ((63, 3, 6), (63, 1, 6)),
    ((2, 1, 5, 80), (2, 1, 5, 80)),
    ((1, 1, 1, 2), (1, 1, 1, 2)),
    ((2, 3, 5, 4), (5, 4)),
    ((1, 2, 0, 8), (1, 1, 0, 8)),
]


def naive(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x: f32[..., D], element by element."""
    half, y = x.shape[-1] // 2, np.zeros_like(x)
    cos, sin = np.broadcast_to(cos, x.shape), np.broadcast_to(sin, x.shape)
    for place in np.ndindex(*x.shape):
        *row, i = place
        partner = -x[(*row, i + half)] if i < half else x[(*row, i - half)]
        y[place] = np.float32(x[place] * cos[place]) + np.float32(partner * sin[place])
    return y


def given(shape: tuple[int, ...], tables: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(len(shape))
    angles = torch.randn(tables) * 9
    return torch.randn(shape), angles.cos(), angles.sin()


def test_a_quarter_turn() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    zero, one = torch.zeros(4), torch.ones(4)
    assert rope(x, zero, one).tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
    assert torch.equal(rope(x, one, zero), x)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_equals_the_formula(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, cos, sin = given(*shapes)
    assert np.array_equal(rope(x, cos, sin).numpy(), naive(x.numpy(), cos.numpy(), sin.numpy()))


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype: torch.dtype, tables: torch.dtype) -> None:
    x, cos, sin = given(*SHAPES[0])
    x, cos, sin = x.to(dtype), cos.to(tables), sin.to(tables)
    expected = naive(x.float().numpy(), cos.float().numpy(), sin.float().numpy())
    assert torch.equal(rope(x, cos, sin), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 8).to(dtype)
    cos, sin = torch.randn(2, 2, 1, 5, 8).to(dtype)
    for view in (x.transpose(1, 2), x.transpose(1, 2)[:, :2], x.transpose(1, 2)[:, :1].expand(-1, 4, -1, -1)):
        assert torch.equal(rope(view, cos, sin), rope(view.contiguous(), cos, sin))
    backwards = x.transpose(1, 3).contiguous().transpose(1, 3).transpose(1, 2)
    assert backwards.stride(-1) != 1
    assert torch.equal(rope(backwards, cos, sin), rope(x.transpose(1, 2), cos, sin))


def test_opcheck() -> None:
    x, cos, sin = given(*SHAPES[0])
    torch.library.opcheck(rope, (x, cos, sin))
    torch.library.opcheck(rope, (x.mT.contiguous().mT.bfloat16(), cos, sin))


def test_refuses_what_has_no_halves() -> None:
    with pytest.raises(KernelError, match="D is 7: D must be even"):
        rope(torch.zeros(1, 1, 3, 7), torch.zeros(3, 7), torch.zeros(3, 7))
    with pytest.raises(KernelError, match="i64"):
        rope(torch.zeros(1, 1, 3, 8, dtype=torch.int64), torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(KernelError, match="sin is bf16"):
        rope(torch.zeros(1, 1, 3, 8), torch.zeros(3, 8), torch.zeros(3, 8).bfloat16())
    with pytest.raises(KernelError, match=r"cos is f32\[3, 4\]"):
        rope(torch.zeros(1, 1, 3, 8), torch.zeros(3, 4), torch.zeros(3, 4))


class Turn(torch.nn.Module):
    """[B, S, H, D] as a projection leaves it."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))


def test_onnx_is_bit_exact(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.rope.onnx import rope as translation

    inputs = [torch.randn(2, 9, 3, 8), *torch.randn(2, 2, 9, 8)]
    exported = export_onnx(Turn(), inputs, {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 257)):
        inputs = [torch.randn(batch, length, 3, 8), *torch.randn(2, batch, length, 8)]
        assert torch.equal(Turn()(*inputs), exported(*inputs)[0])
