"""gated_delta: the recurrence by hand, chunks against tokens, a state that is carried on, forgetting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.gated_delta import reference
from qpcompile.kernels.gated_delta.op import OVERLOAD, gated_delta

# Rows, tokens, heads, key channels, value channels; 64 tokens are one chunk.
SHAPES = [(1, 1, 1, 4, 4), (2, 7, 3, 5, 2), (1, 64, 2, 4, 6), (2, 131, 1, 8, 3), (1, 0, 2, 4, 4)]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def case(rows: int, tokens: int, heads: int, width: int, values: int) -> Operands:
    made = torch.Generator().manual_seed(tokens)
    q, k = (
        torch.nn.functional.normalize(torch.randn(rows, tokens, heads, width, generator=made), dim=-1) for _ in "qk"
    )
    v = torch.randn(rows, tokens, heads, values, generator=made)
    decay = -torch.rand(rows, tokens, heads, generator=made)
    beta = torch.rand(rows, tokens, heads, generator=made)
    return q, k, v, decay, beta, torch.randn(rows, heads, width, values, generator=made)


def test_written_out() -> None:
    one, half = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 0.5)
    # A state of 8 halves to 4; the key reads 4 where 10 is wanted; half of the missing 6 is written.
    y, state = reference.gated_delta(one, one, 10 * one, half.log(), half, torch.full((1, 1, 1, 1), 8.0))
    assert float(state) == pytest.approx(7.0) and float(y) == pytest.approx(7.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_tokens(shape: tuple[int, ...]) -> None:
    operands = case(*shape)
    for found, expected in zip(gated_delta(*operands), reference.gated_delta(*operands), strict=True):
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=2e-5)


def test_a_state_carries_on() -> None:
    q, k, v, decay, beta, state = case(*SHAPES[3])
    whole, last = gated_delta(q, k, v, decay, beta, state)
    first = [each[:, :70] for each in (q, k, v, decay, beta)]
    rest = [each[:, 70:] for each in (q, k, v, decay, beta)]
    begun, middle = gated_delta(*first, state)
    ended, end = gated_delta(*rest, middle)
    assert torch.allclose(torch.cat([begun, ended], dim=1), whole, atol=2e-5) and torch.allclose(end, last, atol=2e-5)


def test_operands_are_not_written() -> None:
    operands = case(*SHAPES[1])
    before = [each.clone() for each in operands]
    gated_delta(*operands)
    assert all(torch.equal(left, right) for left, right in zip(before, operands, strict=True))


def test_opcheck_and_wrong_sizes() -> None:
    operands = case(*SHAPES[1])
    torch.library.opcheck(gated_delta, operands)
    with pytest.raises(KernelError, match="decay"):
        gated_delta(*operands[:3], operands[3][:, :-1], *operands[4:])


class Recurrence(torch.nn.Module):
    """With a state that is made of the first token."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta(q, k, v, decay, beta, k[:, 0, :, :, None] * v[:, 0, :, None, :])


def test_onnx_gives_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.gated_delta.onnx import gated_delta as translation

    exported = export_onnx(Recurrence(), case(2, 7, 3, 5, 2)[:5], {OVERLOAD: translation})
    for rows, tokens in ((1, 1), (3, 70)):
        operands = case(rows, tokens, 3, 5, 2)[:5]
        for found, expected in zip(exported(*operands), Recurrence()(*operands), strict=True):
            assert torch.allclose(found, expected, atol=2e-5), tokens
