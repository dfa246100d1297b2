"""attention_received against one segment at a time in numpy, on every back end; segments do not see each other."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention_received import onnx, pieces, reference
from qpcompile.kernels.attention_received.op import OVERLOAD, attention_received

# Float32 sums of up to 65 probabilities, in a different summation order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
# (query heads, key heads, head size, segment lengths)
CASES = [(1, 1, 1, [1]), (4, 4, 7, [3, 5, 3, 1]), (6, 2, 33, [17, 0, 17]), (2, 1, 64, [0, 65, 2, 65, 0])]


def brute_force(q: Tensor, k: Tensor, ends: list[int], scale: float) -> np.ndarray[Any, Any]:
    """The attention that every token of one row receives, query by query and head by head."""
    queries, keys = q.double().numpy(), k.double().numpy()
    total = np.zeros(q.shape[1])
    for start, end in pairwise(ends):
        for head in range(q.shape[0]):
            group = head * k.shape[0] // q.shape[0]
            for i in range(start, end):
                weights = np.exp(scale * keys[group, start:end] @ queries[head, i])
                total[start:end] += weights / weights.sum() / q.shape[0]
    return total


def make(heads: int, groups: int, width: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = (torch.randn(1, sum(lengths), count, width).transpose(1, 2) for count in (heads, groups))
    return q, k, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_routes_equal_brute_force(case: tuple[Any, ...]) -> None:
    q, k, ends = make(*case)
    expected = torch.from_numpy(brute_force(q[0], k[0], ends.tolist(), 0.3)).float()
    for received in (reference.attention_received, pieces.attention_received, attention_received):
        torch.testing.assert_close(received(q, k, ends, 0.3, False)[0], expected, **CLOSE)


def test_rows_without_segments_are_one_segment_each() -> None:
    q, k = torch.randn(3, 4, 9, 5), torch.randn(3, 2, 9, 5)
    for row, found in enumerate(attention_received(q, k, None, 0.5, False)):
        expected = torch.from_numpy(brute_force(q[row], k[row], [0, 9], 0.5)).float()
        torch.testing.assert_close(found, expected, **CLOSE)
        assert found.mean() == pytest.approx(1)


def test_the_class_token_is_one_query() -> None:
    q, k = torch.randn(2, 4, 9, 5), torch.randn(2, 2, 9, 5)
    found = attention_received(q, k, None, 0.5, True)
    heads = [((0.5 * k[:, head // 2] @ q[:, head, 0, :, None]).squeeze(-1)).softmax(-1) for head in range(4)]
    torch.testing.assert_close(found, torch.stack(heads).mean(0), **CLOSE)
    torch.testing.assert_close(reference.attention_received(q, k, None, 0.5, True), found, **CLOSE)


def test_by_hand() -> None:
    # Scores 0 and ln 3 for both queries of the first segment; the second has one token, which sees itself only.
    q, k = (torch.tensor(each).reshape(1, 1, 3, 1) for each in ([1.0, 1.0, 1.0], [0.0, 1.0, 9.0]))
    found = attention_received(q, k, torch.tensor([0, 2, 3]), float(torch.tensor(3.0).log()), False)
    assert found[0].tolist() == pytest.approx([0.5, 1.5, 1.0])


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=st.integers(0, 9))
def test_a_segment_is_the_same_alone_and_in_a_batch(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    q, k = (torch.randn(1, 2, sum(lengths), 8) for _ in range(2))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    together = attention_received(q, k, ends, 0.5, False)
    for start, end in pairwise(ends.tolist()):
        if end > start:
            alone = attention_received(
                q[:, :, start:end], k[:, :, start:end], torch.tensor([0, end - start]), 0.5, False
            )
            assert torch.equal(alone, together[:, start:end])


def test_pieces_of_any_size_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, ends = make(*CASES[3])
    whole = pieces.attention_received(q, k, ends, 0.3, False)
    for size in (1, 500, 20_000):
        monkeypatch.setattr(pieces, "PIECE", size)
        torch.testing.assert_close(pieces.attention_received(q, k, ends, 0.3, False), whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_float32(dtype: torch.dtype) -> None:
    q, k, ends = make(*CASES[1])
    found = attention_received(q.to(dtype), k.to(dtype), ends, 0.3, False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention_received(q, k, ends, 0.3, False), rtol=2e-2, atol=2e-2)


def test_opcheck() -> None:
    q, k, ends = make(*CASES[1])
    torch.library.opcheck(attention_received, (q, k, ends, 0.3, False))
    torch.library.opcheck(attention_received, (q, k, None, 0.3, True))


def test_refusals() -> None:
    q, k, ends = make(*CASES[1])
    with pytest.raises(KernelError, match=r"D is \d+ and not 5"):
        attention_received(q, k[..., :5], None, 0.3, False)
    with pytest.raises(KernelError, match="Hq must be a multiple of Hkv"):
        attention_received(q, k[:, :3], None, 0.3, False)
    with pytest.raises(KernelError, match="class_token is True"):
        attention_received(q, k, ends, 0.3, True)


class Received(torch.nn.Module):
    """x: f[B, T, 12], ends: i64[B, T]; segments, rows, class token, and grouped keys."""

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        q = x.unflatten(-1, (4, 3)).transpose(1, 2)
        received = torch.ops.qpcompile.attention_received
        plain = [received(q, 2 * q, None, 0.3, class_token) for class_token in (False, True)]
        grouped = [received(q, q[:, :2], None, 0.3, class_token) for class_token in (False, True)]
        return received(q[:1], 2 * q[:1], ends[0], 0.3, False), *plain, *grouped


def test_onnx_is_the_op(export_onnx: Callable[..., Any]) -> None:
    module = Received()

    def inputs(lengths: list[int]) -> list[Tensor]:
        # As many segments as tokens: those after the last one are empty.
        total = sum(lengths)
        ends = torch.tensor([0, *lengths, *[0] * (total - len(lengths) - 1)]).cumsum(0)
        return [torch.randn(2, total, 12), ends.expand(2, -1).contiguous()]

    exported = export_onnx(module, inputs([4, 5]), {OVERLOAD: onnx.attention_received})
    assert not any("::" in each for each in exported.operators)
    for lengths in ([9], [5, 0, 12, 1]):
        case = inputs(lengths)
        for found, expected in zip(exported(*case), module(*case), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)
