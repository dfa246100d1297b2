"""segment_attention against one segment at a time in float64, on every back end; segments do not see each other."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.segment_attention import blocks, onnx, reference
from qpcompile.kernels.segment_attention.op import OVERLOAD, segment_attention

# (query heads, key heads, head size, value size, segment lengths)
CASES = [
    (1, 1, 1, 1, [1]),
    (4, 4, 7, 7, [3, 5, 3, 1]),
    (6, 2, 33, 16, [17, 0, 17, 17]),
    (2, 1, 64, 64, [0, 65, 2, 65, 0]),
]
# Float32 sums of up to 65 products of order 1, in a different summation order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def make(heads: int, groups: int, width: int, out: int, lengths: list[int]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = ((heads, width), (groups, width), (groups, out))
    q, k, v = (torch.randn(1, total, count, size).transpose(1, 2) for count, size in shapes)
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0), 0.3


def naive(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Segment by segment, in float64."""
    parts = []
    repeats = q.shape[1] // k.shape[1]
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        rows, keys, values = (each[:, :, start:end].double() for each in (q, k, v))
        keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
        parts.append((rows @ keys.mT * scale).softmax(-1) @ values)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_routes_equal_the_formula(case: tuple[Any, ...], kind: torch.dtype) -> None:
    q, k, v, ends, scale = make(*case)
    expected = naive(q, k, v, ends, scale).float()
    for attend in (reference.segment_attention, blocks.segment_attention, segment_attention):
        torch.testing.assert_close(attend(q, k, v, ends.to(kind), scale), expected, **CLOSE)


def test_by_hand() -> None:
    # Scores 0 and ln 2 in the first segment; the second has one token, which sees itself only.
    q, k, v = (torch.tensor(each).reshape(1, 1, 3, 1) for each in ([1.0, 1.0, 1.0], [0.0, 1.0, 9.0], [3.0, 12.0, 5.0]))
    y = segment_attention(q, k, v, torch.tensor([0, 2, 3]), float(torch.tensor(2.0).log()))
    assert y.flatten().tolist() == pytest.approx([9.0, 9.0, 5.0])


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=st.integers(0, 9))
def test_a_segment_is_the_same_alone_and_in_a_batch(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, sum(lengths), 8) for _ in range(3))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    together = segment_attention(q, k, v, ends, 0.5)
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if end > start:
            own = [each[:, :, start:end] for each in (q, k, v)]
            assert torch.equal(segment_attention(*own, torch.tensor([0, end - start]), 0.5), together[:, :, start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v, ends, scale = make(*CASES[1])
    q, k, v = (each.to(dtype) for each in (q, k, v))
    y = segment_attention(q, k, v, ends, scale)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), naive(q, k, v, ends, scale).float(), rtol=2e-2, atol=2e-2)


def test_memory_layout_is_that_of_torch_attention() -> None:
    y = segment_attention(*make(*CASES[2]))
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_opcheck(case: tuple[Any, ...]) -> None:
    torch.library.opcheck(segment_attention, make(*case))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(2, 4, 12, 7)}, "operand q"),
        ({"k": torch.zeros(1, 3, 12, 7)}, "operand v"),
        ({"cu_seqlens": torch.tensor([0.0, 12.0])}, "cu_seqlens is f32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "do not cover 12"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 12])}, "do not cover 12"),
        ({"cu_seqlens": torch.tensor([1, 12])}, "do not cover 12"),
    ],
)
def test_refuses(change: dict[str, Tensor], text: str) -> None:
    q, k, v, ends, scale = make(*CASES[1])
    with pytest.raises(KernelError, match=text):
        segment_attention(**{"q": q, "k": k, "v": v, "cu_seqlens": ends, "scale": scale, **change})


class Segments(torch.nn.Module):
    """One packed row, x: f[B, T, 12], ends: i64[B, T]; two query heads on one key head in the second result."""

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = x[:1].unflatten(-1, (4, 3)).transpose(1, 2).tile(1, 1, 1, 3).split(3, dim=-1)
        attend = torch.ops.qpcompile.segment_attention
        return attend(q, 2 * k, v, ends[0], 0.3), attend(q, k[:, :2], v[:, :2], ends[0], 0.3)


def test_onnx_is_the_op(export_onnx: Any) -> None:
    module = Segments()

    def inputs(lengths: list[int]) -> list[Tensor]:
        # As many segments as tokens: those after the last one are empty.
        total = sum(lengths)
        ends = torch.tensor([0, *lengths, *[0] * (total - len(lengths) - 1)]).cumsum(0)
        return [torch.randn(2, total, 12), ends.expand(2, -1).contiguous()]

    exported = export_onnx(module, inputs([4, 5]), {OVERLOAD: onnx.segment_attention})
    assert not any("::" in each for each in exported.operators)
    for lengths in ([9], [5, 0, 12, 1]):
        case = inputs(lengths)
        for found, expected in zip(exported(*case), module(*case), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)
