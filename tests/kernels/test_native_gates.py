"""Activations and gates in C, tabulated for bfloat16."""

from __future__ import annotations

import pytest
import torch

from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import GATES, Kind, RowPlan

pytestmark = pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")


@pytest.mark.parametrize("kind", GATES)
def test_gates_of_many_rows_are_those_of_one(kind: Kind) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(16, 4096)
    second = None if kind.startswith("gelu_") else torch.randn(4096).bfloat16().expand(16, -1)
    plan = RowPlan(kind, torch.bfloat16, 4096)
    found = plan.stored(every, second)
    for row in range(16):
        one = plan.stored(every[row : row + 1], None if second is None else second[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], one, rtol=0, atol=0, equal_nan=True)
