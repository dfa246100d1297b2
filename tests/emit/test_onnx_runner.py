"""The runner's numpy code equals transformers' torch code, for pictures of awkward sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from qpcompile.emit.onnx.runner.runner import patch_layout, picture_positions, text_positions

GRID = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@given(st.lists(GRID, min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 5))
def test_patch_layout(grids: list[tuple[int, int, int]], merge: int, side: int) -> None:
    patch = 14
    sizes = np.array([(frames, rows * merge, columns * merge) for frames, rows, columns in grids])
    window = side * merge * patch
    layout = patch_layout(sizes, {"spatial_merge_size": merge, "window_size": window, "patch_size": patch})
    tensor = torch.from_numpy(sizes)
    order, ends = get_vision_window_index(tensor, merge, window, patch)
    assert layout["window_index"].tolist() == order.tolist()
    assert layout["cu_window_seqlens"].tolist() == ends.tolist()
    assert layout["cu_seqlens"].tolist() == get_vision_cu_seqlens(tensor).tolist()
    assert layout["position_ids"].tolist() == get_vision_position_ids(tensor, merge).tolist()


def test_towers_without_windows_get_none() -> None:
    layout = patch_layout(np.array([[1, 4, 6]]), {"spatial_merge_size": 2})
    assert sorted(layout) == ["cu_seqlens", "grid_thw", "position_ids"]


@given(st.lists(st.lists(GRID, max_size=3), min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_picture_positions(rows: list[list[tuple[int, int, int]]], merge: int, data: st.DataObject) -> None:
    """Rows with any number of pictures between texts, left-padded."""
    texts = [[data.draw(st.integers(1, 4)) for _ in range(len(row) + 1)] for row in rows]
    flags = [_flags(row, text) for row, text in zip(rows, texts, strict=True)]
    width = max(map(len, flags))
    visual = np.array([[False] * (width - len(row)) + row for row in flags])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in flags])
    grids = np.array([(f, h * merge, w * merge) for row in rows for f, h, w in row]).reshape(-1, 3)
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge, tokens_per_second=2)),
        get_vision_position_ids=lambda *args, **named: Qwen2_5_VLModel.get_vision_position_ids(model, *args, **named),
    )
    rope_index: Any = Qwen2_5_VLModel.get_rope_index
    expected, _ = rope_index(
        model,
        torch.from_numpy(visual.astype(np.int64)),
        torch.from_numpy(visual.astype(np.int32)),
        image_grid_thw=torch.from_numpy(grids),
        attention_mask=torch.from_numpy(mask),
    )
    assert picture_positions(visual, mask, grids, merge).tolist() == expected.tolist()


def _flags(grids: list[tuple[int, int, int]], texts: list[int]) -> list[bool]:
    flags = [False] * texts[0]
    for (frames, height, width), text in zip(grids, texts[1:], strict=True):
        flags += [True] * (frames * height * width) + [False] * text
    return flags


@pytest.mark.parametrize(("mask", "positions"), [([1, 1, 1], [0, 1, 2]), ([0, 0, 1, 1], [0, 0, 0, 1])])
def test_text_positions(mask: list[int], positions: list[int]) -> None:
    assert text_positions(np.array([mask])).tolist() == [positions]
