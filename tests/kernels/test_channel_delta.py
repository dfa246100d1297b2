"""channel_delta: the recurrence by hand, chunks against tokens, a state that is carried on, forgetting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.channel_delta import reference
from qpcompile.kernels.channel_delta.op import OVERLOAD, channel_delta
from qpcompile.kernels.gated_delta.op import gated_delta

# Rows, tokens, heads, key channels, value channels; 32 tokens are one chunk.
SHAPES = [(1, 1, 1, 4, 4), (2, 7, 3, 5, 2), (1, 64, 2, 4, 6), (2, 131, 1, 8, 3), (1, 0, 2, 4, 4)]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def case(rows: int, tokens: int, heads: int, width: int, values: int) -> Operands:
    made = torch.Generator().manual_seed(tokens)
    q, k = (
        torch.nn.functional.normalize(torch.randn(rows, tokens, heads, width, generator=made), dim=-1) for _ in "qk"
    )
    v = torch.randn(rows, tokens, heads, values, generator=made)
    decay = -torch.rand(rows, tokens, heads, width, generator=made)
    beta = torch.rand(rows, tokens, heads, generator=made)
    return q, k, v, decay, beta, torch.randn(rows, heads, width, values, generator=made)


def test_written_out() -> None:
    q, k, half = torch.ones(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0]]]]), torch.full((1, 1, 1), 0.5)
    # Of a state of (8, 8) the second channel halves to 4; the key reads 4 where 10 is wanted; half of 6 is written.
    decay = torch.tensor([[[[1.0, 0.5]]]]).log()
    y, state = reference.channel_delta(q, k, torch.full((1, 1, 1, 1), 10.0), decay, half, torch.full((1, 1, 2, 1), 8.0))
    assert state.flatten().tolist() == pytest.approx([8.0, 7.0]) and float(y) == pytest.approx(15.0)


def test_channels_that_decay_alike_are_gated_delta() -> None:
    q, k, v, decay, beta, state = case(2, 70, 3, 5, 2)
    alike = decay[..., :1]
    found = channel_delta(q, k, v, alike.expand_as(k).contiguous(), beta, state)
    for left, right in zip(found, gated_delta(q, k, v, alike[..., 0].contiguous(), beta, state), strict=True):
        assert torch.allclose(left, right, atol=2e-5)


def test_a_channel_that_forgets_all_stays_finite() -> None:
    q, k, v, decay, beta, state = case(1, 64, 2, 4, 6)
    decay[..., 0] = -200.0
    for left, right in zip(
        channel_delta(q, k, v, decay, beta, state), reference.channel_delta(q, k, v, decay, beta, state), strict=True
    ):
        assert bool(left.isfinite().all()) and torch.allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_tokens(shape: tuple[int, ...]) -> None:
    operands = case(*shape)
    for found, expected in zip(channel_delta(*operands), reference.channel_delta(*operands), strict=True):
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=2e-5)


def test_a_state_carries_on() -> None:
    q, k, v, decay, beta, state = case(*SHAPES[3])
    whole, last = channel_delta(q, k, v, decay, beta, state)
    first = [each[:, :70] for each in (q, k, v, decay, beta)]
    rest = [each[:, 70:] for each in (q, k, v, decay, beta)]
    begun, middle = channel_delta(*first, state)
    ended, end = channel_delta(*rest, middle)
    assert torch.allclose(torch.cat([begun, ended], dim=1), whole, atol=2e-5) and torch.allclose(end, last, atol=2e-5)


def test_operands_are_not_written() -> None:
    operands = case(*SHAPES[1])
    before = [each.clone() for each in operands]
    channel_delta(*operands)
    assert all(torch.equal(left, right) for left, right in zip(before, operands, strict=True))


def test_opcheck_and_wrong_sizes() -> None:
    operands = case(*SHAPES[1])
    torch.library.opcheck(channel_delta, operands)
    with pytest.raises(KernelError, match="decay"):
        channel_delta(*operands[:3], operands[3][:, :-1], *operands[4:])


class Recurrence(torch.nn.Module):
    """With a state that is made of the first token."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return channel_delta(q, k, v, decay, beta, k[:, 0, :, :, None] * v[:, 0, :, None, :])


def test_onnx_gives_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.channel_delta.onnx import channel_delta as translation

    exported = export_onnx(Recurrence(), case(2, 7, 3, 5, 2)[:5], {OVERLOAD: translation})
    for rows, tokens in ((1, 1), (3, 70)):
        operands = case(rows, tokens, 3, 5, 2)[:5]
        for found, expected in zip(exported(*operands), Recurrence()(*operands), strict=True):
            assert torch.allclose(found, expected, atol=2e-5), tokens
