"""text_relevance against cosines in numpy, both signs, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.text_relevance.op import OVERLOAD, text_relevance


def case(batch: int, length: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row i has i padding tokens, a word, visual tokens up to two thirds, then text with a second picture in it."""
    made = torch.Generator().manual_seed(seed)
    places = torch.arange(length).expand(batch, length) - torch.arange(batch)[:, None]
    visual = ((places >= 1) & (places < 2 * length // 3)) | (places == length - batch - 2)
    return torch.randn(batch, length, width, generator=made), visual, places >= 0


def by_cosines(hidden: np.ndarray, visual: np.ndarray, valid: np.ndarray, sign: int) -> np.ndarray:
    """One row: the mean over the text after the first picture token, cosine by cosine."""
    own = [i for i in range(len(hidden)) if visual[i] and valid[i]]
    text = [i for i in range(len(hidden)) if valid[i] and not visual[i] and i > own[0]]
    relevance = np.zeros(len(hidden))
    for i in own:
        norms = [np.linalg.norm(hidden[i]) * np.linalg.norm(hidden[t]) for t in text]
        relevance[i] = sign * np.mean([hidden[i] @ hidden[t] / norm for t, norm in zip(text, norms, strict=True)])
    low, high = relevance[own].min(), relevance[own].max()
    relevance[own] = (relevance[own] - low + 1e-6) / (high - low + 1e-6)
    return relevance


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_cosines(sign: int, batch: int) -> None:
    hidden, visual, valid = case(batch, 23, 17)
    found = text_relevance(hidden, visual, valid, sign)
    for row in range(batch):
        expected = by_cosines(hidden[row].double().numpy(), visual[row].numpy(), valid[row].numpy(), sign)
        assert np.abs(found[row].numpy() - expected).max() < 1e-6


def test_sign_says_whether_like_or_unlike_tokens_are_relevant() -> None:
    word = torch.tensor([1.0, 0.0])
    hidden = torch.stack([word, -word, torch.tensor([0.0, 1.0]), word])[None]
    visual = torch.tensor([[True, True, True, False]])
    valid = torch.ones_like(visual)
    assert text_relevance(hidden, visual, valid, 1)[0].tolist() == pytest.approx([1, 0, 0.5, 0], abs=1e-5)
    assert text_relevance(hidden, visual, valid, -1)[0].tolist() == pytest.approx([0, 1, 0.5, 0], abs=1e-5)


def test_without_text_all_tokens_are_equally_relevant() -> None:
    hidden, visual, valid = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    assert text_relevance(hidden, visual, valid, 1).tolist() == [[1.0] * 5]
    assert text_relevance(hidden, ~visual, valid, 1).tolist() == [[0.0] * 5]


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(text_relevance, (*case(2, 9, 5), -1))
    with pytest.raises(KernelError, match="sign is 0"):
        text_relevance(*case(2, 9, 5), 0)


class Relevance(torch.nn.Module):
    """Both signs."""

    def forward(self, hidden: Tensor, visual: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return text_relevance(hidden, visual, valid, 1), text_relevance(hidden, visual, valid, -1)


def test_onnx_computes_the_same(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.text_relevance.onnx import text_relevance as translation

    exported = export_onnx(Relevance(), case(2, 12, 24), {OVERLOAD: translation})
    for batch, length in ((1, 6), (3, 17), (2, 63)):
        inputs = case(batch, length, 24, seed=length)
        for found, expected in zip(exported(*inputs), Relevance()(*inputs), strict=True):
            assert torch.allclose(found, expected, atol=1e-7, rtol=0)
