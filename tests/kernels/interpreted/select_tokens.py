"""Cases for select_tokens' Triton kernels under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.select_tokens import reference
from qpcompile.kernels.select_tokens import triton as kernels


def same(scores: Tensor, keep: int, quota: list[int]) -> None:
    limits = torch.tensor(quota)
    for found, expected in zip(
        kernels.select_tokens(scores, keep, limits), reference.select_tokens(scores, keep, limits), strict=True
    ):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("length", "keep"),
    [(1, 1), (1, 0), (63, 17), (64, 64), (576, 192), pytest.param(1500, 1100, marks=pytest.mark.slow)],
)
def test_kernels_are_the_reference(length: int, keep: int) -> None:
    same(torch.randn(3, length), keep, [keep, keep // 2, 0])


def test_equal_and_special_scores_keep_their_order() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 1.0, torch.nan, torch.inf, -torch.inf])
    scores = torch.stack([special.repeat(9), torch.zeros(90), torch.randint(3, (90,)).float()])
    for keep in range(0, 91, 7):
        same(scores, keep, [keep, 5, 80])


def test_strided_and_no_rows() -> None:
    same(torch.randn(70, 3).T, 9, [9, 4, 1])
    same(torch.randn(0, 70), 9, [])
