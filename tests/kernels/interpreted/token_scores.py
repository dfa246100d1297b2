"""Cases for token_scores' Triton kernels under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.token_scores import reference
from qpcompile.kernels.token_scores import triton as kernels


def check(q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, groups: Tensor) -> None:
    found = kernels.attention_mass(q, k, mask, 0.3, valid, groups)
    expected = reference.attention_mass(q, k, mask, 0.3, valid, groups)
    # Sums of up to 150 probabilities in float32.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def flags(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The valid tokens, and two groups of queries: one of few, far apart, one of many."""
    position = torch.arange(length)
    valid = (position < length - torch.arange(batch)[:, None]).clone()
    few, many = position % 47 == 40, (position > 3) & (position < length // 2)
    return valid, torch.stack([few, many]).expand(batch, -1, -1) & valid[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "head_dim"), [(1, 1, 1, 1, 8), (2, 4, 2, 63, 20), (1, 2, 1, 150, 64)]
)
def test_causal_is_the_reference(
    batch: int, heads: int, groups: int, length: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k = torch.randn(batch, heads, length, head_dim).to(dtype), torch.randn(batch, groups, length, head_dim).to(dtype)
    check(q, k, None, *flags(batch, length))


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
def test_masks(kind: str) -> None:
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16)
    mask = torch.rand(1 if kind == "per head" else 2, 4 if kind == "per head" else 1, 70, 70) < 0.7
    mask[0, :, 40] = False
    if kind == "float":
        mask = torch.randn(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    check(q, k, mask, *flags(2, 70))


def test_no_query_is_asked_for() -> None:
    q = torch.randn(1, 2, 70, 16)
    valid = torch.ones(1, 70, dtype=torch.bool)
    found = kernels.attention_mass(q, q, None, 0.3, valid, torch.zeros(1, 2, 70, dtype=torch.bool))
    assert not found[0].any() and not found[1].any()


def test_strided() -> None:
    q, k = torch.randn(2, 63, 4, 16).transpose(1, 2), torch.randn(2, 63, 2, 16).transpose(1, 2)
    check(q, k, None, *flags(2, 63))
