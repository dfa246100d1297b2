"""Positions of tokens and patches, and windows of patches, in numpy.

As the models define them: "Qwen2-VL", section 2.1 (arXiv 2409.12191), and "Qwen2.5-VL", section 2.1 (arXiv 2502.13923).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def text_positions(mask: Array) -> Array:
    """Positions i64[B, S] that count the tokens which are not padding; mask: i64[B, S]."""
    return np.where(mask == 0, 0, np.cumsum(mask, axis=1) - 1)


def picture_positions(visual: Array, mask: Array, grids: Array, merge: int) -> Array:
    """Frame, row and column of every token, i64[3, B, S]: text counts on all three axes, a picture spans its grid.

    Args:
        visual: bool[B, S], the tokens of pictures.
        mask: i64[B, S], 0 on padding.
        grids: i64[pictures, 3], in patches; a token covers merge x merge of them.
    """
    positions = np.zeros((3, *visual.shape), np.int64)
    pictures = iter(grids.tolist())
    for row, (flags, real) in enumerate(zip(visual, mask.astype(bool), strict=True)):
        parts: list[Array] = []
        start = 0
        for is_picture, group in groupby(flags[real].tolist()):
            if is_picture:
                frames, height, width = next(pictures)
                parts.append(np.indices((frames, height // merge, width // merge)).reshape(3, -1) + start)
                start += max(height, width) // merge
            else:
                length = len(list(group))
                parts.append(np.broadcast_to(np.arange(length), (3, length)) + start)
                start += length
        positions[:, row, real] = np.concatenate(parts, axis=1)
    return positions


def patch_layout(grids: Array, config: Mapping[str, Any]) -> dict[str, Array]:
    """What a tower over packed patches needs to know about the pictures; grids: i64[pictures, 3]."""
    merge = int(config.get("spatial_merge_size", 1))
    frames = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
    layout = {
        "grid_thw": grids,
        "cu_seqlens": np.concatenate([[0], np.cumsum(frames)]),
        "position_ids": patch_positions(grids, merge),
    }
    if config.get("window_size") is not None:
        side = int(config["window_size"]) // merge // int(config["patch_size"])
        layout["window_index"], layout["cu_window_seqlens"] = windows(grids, merge, side)
    return layout


def patch_positions(grids: Array, merge: int) -> Array:
    """Row and column of every patch, i64[P, 2]; patches come in blocks of merge x merge, as they are merged later."""
    parts: list[Array] = []
    for frames, height, width in grids.tolist():
        axes = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
        parts.append(np.tile(axes.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (frames, 1)))
    return np.concatenate(parts)


def windows(grids: Array, merge: int, side: int) -> tuple[Array, Array]:
    """Order i64[P / merge^2] that puts the tokens of one window together, and where windows end, in patches.

    Windows are side x side tokens; those at the right and lower border hold fewer.
    """
    order: list[Array] = []
    lengths: list[int] = []
    first = 0
    for frames, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        tokens = np.arange(frames * rows * columns).reshape(frames, rows, columns) + first
        first += tokens.size
        for frame in tokens:
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    window = frame[top : top + side, left : left + side].ravel()
                    order.append(window)
                    lengths.append(window.size * merge * merge)
    return np.concatenate(order), np.concatenate([[0], np.cumsum(lengths)])
