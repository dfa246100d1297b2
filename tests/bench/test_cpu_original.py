"""The comparison with the original: both answer, and the table has a line per recipe, dtype and numerics."""

from __future__ import annotations

import cpu_original
import pytest
import torch
from cpu_shapes import SHAPES

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (torch.float32, ["fast"]),
        pytest.param(torch.float32, ["fast", "exact"], marks=SLOW),
        pytest.param(torch.bfloat16, ["fast"], marks=SLOW),
    ],
    ids=str,
)
def test_rows_compare_both(dtype: torch.dtype, asked: list[str]) -> None:
    lines = cpu_original.rows(SHAPES["tiny-A"], "w4a4kv4", dtype, asked, rounds=1)
    for line, numerics in zip(lines, asked, strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[:3] == ["w4a4kv4", str(dtype).removeprefix("torch."), numerics] and len(cells) == 9
        first, compiled, ratio = (float(cell.replace(",", "")) for cell in cells[3:6])
        assert min(first, compiled) > 0 and abs(ratio - compiled / first) < 0.2 * ratio + 0.01
