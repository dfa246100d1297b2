"""The comparison with the original: both answer, and the table has a line per recipe and dtype."""

from __future__ import annotations

import cpu_original
import pytest
import torch
from cpu_shapes import SHAPES

SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)], ids=str)
def test_a_row_compares_both(dtype: torch.dtype) -> None:
    cells = cpu_original.row(SHAPES["tiny-A"], "w4a4kv4", dtype, rounds=1).strip("| ").split(" | ")
    assert cells[:2] == ["w4a4kv4", str(dtype).removeprefix("torch.")] and len(cells) == 8
    first, compiled, ratio = (float(cell.replace(",", "")) for cell in cells[2:5])
    assert min(first, compiled) > 0 and abs(ratio - compiled / first) < 0.2 * ratio + 0.01
