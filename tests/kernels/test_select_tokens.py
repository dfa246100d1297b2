"""select_tokens against sorting in Python, with ties, quotas and a symbolic count, in torch and in onnxruntime."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.select_tokens.op import OVERLOAD, select_tokens

INF = float("inf")


def brute_force(scores: list[float], keep: int, quota: int) -> tuple[list[int], list[bool]]:
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    index = sorted(ranked)
    return index, [ranked.index(i) < quota for i in index]


def tied_scores(batch: int, length: int, levels: int) -> Tensor:
    """f32[batch, length] with few distinct values, text at +inf and padding at -inf."""
    scores = torch.randint(0, levels, (batch, length)).float() / 8
    scores[:, ::5] = INF
    scores[0, : length // 4] = -INF
    return scores


def test_by_hand() -> None:
    scores = torch.tensor([[0.5, INF, 0.9, 0.5], [-INF, 0.1, 0.2, INF]])
    index, valid = select_tokens(scores, 3, torch.tensor([3, 2]))
    # Row 0: 1, 2, then 0 wins its tie with 3. Row 1: 3, 2 within the quota, then 1.
    assert index.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert valid.tolist() == [[True, True, True], [False, True, True]]


@settings(deadline=None)
@given(st.data())
def test_equals_sorting(data: st.DataObject) -> None:
    values = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.25, 1.0, INF])
    scores = data.draw(st.lists(values, min_size=1, max_size=70))
    keep = data.draw(st.integers(0, len(scores)))
    quota = data.draw(st.integers(0, len(scores) + 1))
    index, valid = select_tokens(torch.tensor([scores]), keep, torch.tensor([quota]))
    assert (index[0].tolist(), valid[0].tolist()) == brute_force(scores, keep, quota)


@pytest.mark.parametrize("length", [1, 17, 63, 257])
def test_rows_are_independent_and_repeatable(length: int) -> None:
    scores = tied_scores(3, length, 4)
    keep, quota = (length + 1) // 2, torch.tensor([0, length // 3, length])
    index, valid = select_tokens(scores, keep, quota)
    for row in range(3):
        expected = brute_force(scores[row].tolist(), keep, int(quota[row]))
        assert (index[row].tolist(), valid[row].tolist()) == expected
    again = select_tokens(scores.T.contiguous().T, keep, quota)
    assert torch.equal(again[0], index) and torch.equal(again[1], valid)


def test_keeping_all_is_the_identity() -> None:
    index, valid = select_tokens(torch.randn(2, 9), 9, torch.tensor([9, 9]))
    assert index.tolist() == [list(range(9))] * 2 and valid.all()


def test_selected_cache_entries_keep_their_codes() -> None:
    keys = torch.randn(2, 3, 40, 8)
    index, _ = select_tokens(torch.randn(2, 40), 11, torch.tensor([11, 11]))

    def gather(x: Tensor) -> Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    for of_all, of_kept in zip(kv_write(keys, 4), kv_write(gather(keys), 4), strict=True):
        assert torch.equal(gather(of_all), of_kept)


def test_opcheck() -> None:
    torch.library.opcheck(select_tokens, (tied_scores(2, 17, 3), 5, torch.tensor([5, 3])))


def test_refusals() -> None:
    with pytest.raises(KernelError, match="keep is 7, S is 6"):
        select_tokens(torch.randn(1, 6), 7, torch.tensor([7]))
    with pytest.raises(KernelError, match="quota is i32"):
        select_tokens(torch.randn(1, 6), 2, torch.tensor([7], dtype=torch.int32))
    with pytest.raises(KernelError, match="scores is f64"):
        select_tokens(torch.randn(1, 6).double(), 2, torch.tensor([7]))


class Select(torch.nn.Module):
    """Keeps all but five tokens of a row, by its own quota, and in a second call one token."""

    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        quota = (scores > 0).sum(1)
        return *select_tokens(scores, scores.shape[1] - 5, quota), *select_tokens(scores, 1, quota)


def test_export_keeps_the_count_symbolic() -> None:
    # At least two tokens stay: torch.export treats a size of 1 as a case of its own.
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=7)}
    exported = torch.export.export(Select(), (tied_scores(2, 20, 3),), dynamic_shapes=(sizes,))
    counts = [node.args[1] for node in exported.graph.nodes if node.target is OVERLOAD]
    assert isinstance(counts[0], torch.fx.Node) and counts[1] == 1
    for batch, length in ((2, 7), (3, 63), (2, 257)):
        scores = tied_scores(batch, length, 3)
        assert all(map(torch.equal, exported.module()(scores), Select()(scores)))


def test_onnx_selects_the_same_tokens(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.select_tokens.onnx import select_tokens as translation

    exported = export_onnx(Select(), [tied_scores(2, 20, 3)], {OVERLOAD: translation})
    for batch, length in ((1, 6), (3, 17), (2, 63), (2, 257), (1, 1000)):
        for levels in (1, 3, 1_000_000):
            scores = tied_scores(batch, length, levels)
            assert all(map(torch.equal, exported(scores), Select()(scores)))
