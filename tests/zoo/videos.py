"""Prompts with a video, for families that take one: its frames in place of a prompt's picture."""

from __future__ import annotations

from typing import Any

import torch
from pictures import Inputs, noise
from shape import Shape

FRAMES = 2  # of patches in time; of pixels where the tower takes whole frames
# Families that put the marks of a picture around every frame.
FRAME_BY_FRAME = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")


def with_video(name: str, model: Any, shape: Shape, case: Inputs) -> Inputs:
    """The prompt of `case`, one row with one picture, asked about a video of the picture's size instead."""
    image, video = int(model.config.image_token_id), int(model.config.video_token_id)
    ids = case["input_ids"]
    places = (ids[0] == image).nonzero()[:, 0]
    first, count = int(places[0]), len(places)
    before, after = ids[:, :first], ids[:, first + count :]
    given = {key: value for key, value in case.items() if key not in ("pixel_values", "image_grid_thw", "image_sizes")}
    if "image_grid_thw" in case:
        _, height, width = case["image_grid_thw"][0].tolist()
        given["pixel_values_videos"] = noise(7, FRAMES * height * width, case["pixel_values"].shape[1])
        given["video_grid_thw"] = torch.tensor([[FRAMES, height, width]])
        shown = torch.full((1, count), video)
        if name in FRAME_BY_FRAME:
            middle = torch.tensor([[shape.stop, shape.start]])
            shown = torch.cat([shown, middle, shown], dim=1)
        else:
            shown = torch.cat([shown] * FRAMES, dim=1)
    else:
        frames = noise(7, 1, FRAMES, 3, shape.side, shape.side)
        given["pixel_values_videos"] = frames
        with torch.no_grad():
            features = model.model.get_video_features(frames, return_dict=True).pooler_output
        shown = torch.full((1, sum(each.flatten(0, -2).shape[0] for each in features)), video)
    new = torch.cat([before, shown, after], dim=1)
    given |= {"input_ids": new, "attention_mask": torch.ones_like(new)}
    if "mm_token_type_ids" in case:
        given["mm_token_type_ids"] = torch.where(new == video, 2, 0)
    return given
