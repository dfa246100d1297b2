"""Which convolutions are matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import traced
from torch import Tensor, nn

from qpcompile.ir.convolutions import CONVOLUTIONS, cuts_patches, is_plain
from qpcompile.ir.edit import calls


@pytest.mark.parametrize(("padding", "dilation", "groups"), [(0, 1, 1), ([0, 0], [1, 1], 1), ([0], 1, 1)])
def test_plain(padding: Any, dilation: Any, groups: int) -> None:
    assert is_plain(padding, dilation, groups)


@pytest.mark.parametrize(("padding", "dilation", "groups"), [(1, 1, 1), ([0, 2], 1, 1), (0, [1, 2], 1), (0, 1, 2)])
def test_not_plain(padding: Any, dilation: Any, groups: int) -> None:
    assert not is_plain(padding, dilation, groups)


class Patches(nn.Module):
    """A convolution whose kernel has 4 x 4 pixels."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("weight", torch.ones(5, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.get_buffer("weight"), **self.options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stride": 4}, True),
        ({"stride": (4, 4), "padding": 0}, True),
        ({}, False),
        ({"stride": (4, 2)}, False),
        ({"stride": 4, "padding": 4}, False),
        ({"stride": 4, "dilation": 2}, False),
    ],
    ids=str,
)
def test_patches_that_do_not_overlap(options: dict[str, Any], expected: bool) -> None:
    (node,) = calls(traced(Patches(options), {"x": torch.ones(1, 2, 16, 16)}, axes={"x": ()}), *CONVOLUTIONS)
    assert cuts_patches(node) is expected
