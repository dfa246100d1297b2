"""Cases for dpp_select's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.dpp_select import reference
from qpcompile.kernels.dpp_select import triton as kernels


def check(features: Tensor, relevance: Tensor, counted: Tensor, budget: list[int]) -> None:
    found = kernels.dpp_select(features, relevance, counted, torch.tensor(budget))
    assert torch.equal(found, reference.dpp_select(features, relevance, counted, torch.tensor(budget)))


@pytest.mark.parametrize(("length", "width", "budget"), [(1, 3, 1), (17, 20, 9), (63, 16, 30), (70, 64, 0)])
def test_kernel_is_the_reference(length: int, width: int, budget: int) -> None:
    counted = torch.rand(2, length) < 0.8
    # The middle width is below the budget: the rest is in the span of the picked tokens, and the loop stops.
    check(torch.randn(2, length, width), torch.rand(2, length) + 0.1, counted, [budget, budget // 2])


def test_equal_tokens_tie_to_the_lower_index() -> None:
    features = torch.randn(1, 5, 8).repeat(1, 4, 1)
    check(features, torch.ones(1, 20), torch.ones(1, 20, dtype=torch.bool), [12])


def test_nothing_counts_or_no_rows() -> None:
    check(torch.randn(1, 9, 4), torch.rand(1, 9), torch.zeros(1, 9, dtype=torch.bool), [3])
    assert kernels.dpp_select(
        torch.randn(0, 9, 4), torch.rand(0, 9), torch.ones(0, 9, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    ).shape == (0, 9)
