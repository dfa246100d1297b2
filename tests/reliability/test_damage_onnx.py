"""A short run of the fuzzer of exported folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.damage_onnx import damaged, exported, wrong


@pytest.mark.slow
def test_damaged_folders_are_refused_or_answer(tmp_path: Path) -> None:
    whole, inputs = exported(tmp_path)
    table = damaged(whole, inputs, tmp_path, seed=0, count=80, show=True)
    assert sum(row.total() for row in table.values()) == 80 and not wrong(table)
