"""merge_tokens against loops over tokens in numpy, both rules, on every back end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.merge_tokens import cpu, onnx, reference
from qpcompile.kernels.merge_tokens.op import OVERLOAD, merge_tokens

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def brute_force(hidden: Any, keys: Any, weights: Any, targets: Any, sources: Any, nearest: int) -> np.ndarray[Any, Any]:
    """One row, token by token."""
    norms = np.linalg.norm(keys, axis=1)

    def similarity(i: int, j: int) -> float:
        return float(keys[i] @ keys[j] / (norms[i] * norms[j]))

    into, of = np.flatnonzero(targets).tolist(), np.flatnonzero(sources).tolist()
    y = hidden.copy()
    for i in into:
        if nearest:
            closest = sorted((j for j in of if j != i), key=lambda j: (-similarity(i, j), j))[:nearest]
            y[i] += sum(weights[j] * hidden[j] for j in closest)
        else:
            joined = [j for j in of if max(into, key=lambda t: (similarity(t, j), -t)) == i]
            y[i] += np.mean(hidden[joined], axis=0) if joined else 0
    return y


def make(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden, keys = torch.randn(batch, length, 5), torch.randn(batch, length, 3)
    kind = torch.randint(0, 4, (batch, length))
    return hidden, keys, torch.rand(batch, length), kind == 1, kind >= 2


@settings(deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 23), seed=st.integers(0, 99), nearest=st.sampled_from([0, 1, 4]))
def test_all_routes_equal_brute_force(batch: int, length: int, seed: int, nearest: int) -> None:
    arguments = make(batch, length, seed)
    rows: list[Any] = [[each[row].numpy() for each in arguments] for row in range(batch)]
    expected = torch.from_numpy(np.stack([brute_force(*row, nearest=nearest) for row in rows]))
    routes: tuple[Callable[..., Tensor], ...] = (reference.merge_tokens, cpu.merge_tokens, merge_tokens)
    for merge in routes:
        torch.testing.assert_close(merge(*arguments, nearest), expected, **CLOSE)


def test_by_hand() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.1], [5.0, 0.0]]])
    targets = torch.tensor([[True, True, False, False]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    # Tokens 2 and 3 are similar to token 0; token 1 gets nothing.
    assert merge_tokens(hidden, keys, weights, targets, ~targets, 0).flatten().tolist() == [7, 2, 4, 8]
    # The closest to token 0 is 3, to token 1 it is 2.
    found = merge_tokens(hidden, keys, weights, targets, ~targets, 1).flatten().tolist()
    assert found == pytest.approx([1 + 0.4 * 8, 2 + 0.3 * 4, 4, 8])


@pytest.mark.parametrize("nearest", [0, 3])
def test_equal_keys_go_to_the_lower_index(nearest: int) -> None:
    hidden = torch.eye(6)[None]
    targets = torch.tensor([[False, True, True, False, False, False]])
    arguments = (hidden, torch.ones(1, 6, 2), torch.ones(1, 6), targets, ~targets, nearest)
    for merge in (reference.merge_tokens, merge_tokens):
        added = merge(*arguments)[0] - hidden[0]
        if nearest:
            assert added[1].tolist() == added[2].tolist() == [1, 0, 0, 1, 1, 0]
        else:
            assert added[1].tolist() == [0.25, 0, 0, 0.25, 0.25, 0.25] and not added[2].any()


@pytest.mark.parametrize("nearest", [0, 2])
def test_half_precision_and_nothing_to_merge(nearest: int) -> None:
    hidden, keys, weights, targets, sources = make(2, 12)
    found = merge_tokens(hidden.half(), keys.half(), weights, targets, sources, nearest)
    assert found.dtype == torch.float16
    expected = merge_tokens(hidden, keys, weights, targets, sources, nearest)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    none = torch.zeros_like(targets)
    for arguments in ((none, sources), (targets, none)):
        assert torch.equal(merge_tokens(hidden, keys, weights, *arguments, nearest), hidden)


def test_opcheck() -> None:
    torch.library.opcheck(merge_tokens, (*make(2, 9), 0))
    torch.library.opcheck(merge_tokens, (*make(2, 9), 2))


def test_refusals() -> None:
    hidden, keys, weights, targets, sources = make(1, 5)
    with pytest.raises(KernelError, match="dimensions"):
        merge_tokens(hidden[0], keys, weights, targets, sources, 0)
    with pytest.raises(KernelError, match="weights is f64"):
        merge_tokens(hidden, keys, weights.double(), targets, sources, 0)
    with pytest.raises(KernelError, match="nearest is -1"):
        merge_tokens(hidden, keys, weights, targets, sources, -1)


class Merge(torch.nn.Module):
    """x: f[B, S, 7]: keys, a weight, and who is target or source."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kind = x[..., 6]
        merge = torch.ops.qpcompile.merge_tokens
        arguments = (x, x[..., :3], x[..., 3].abs(), kind > 0.5, kind < 0)
        return merge(*arguments, 0), merge(*arguments, 4)


def test_onnx_is_the_op(export_onnx: Callable[..., Any]) -> None:
    exported = export_onnx(Merge(), [torch.randn(2, 20, 7)], {OVERLOAD: onnx.merge_tokens})
    assert not any("::" in each for each in exported.operators)
    for batch, length in ((1, 3), (3, 17), (2, 61)):
        x = torch.randn(batch, length, 7)
        for found, expected in zip(exported(x), Merge()(x), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)
