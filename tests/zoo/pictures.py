"""Picture inputs as the processors of families give them, made by hand: pixels of noise, sizes and masks.

`pictures(numbers)` gives the inputs of the pictures of those numbers. Where a family takes pictures of several sizes,
even and odd numbers differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from shape import Shape

Inputs = dict[str, Any]
Pictures = Callable[[Sequence[int]], Inputs]


def noise(picture: int, *shape: int) -> torch.Tensor:
    """The pixels of picture number `picture`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + picture))


def stacked(size: int, name: str = "pixel_values", frames: int = 0, **more: Any) -> Pictures:
    """One square of pixels per picture, or several frames; `more` are inputs with the same value in every row."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        shape = (*([frames] if frames else []), 3, size, size)
        pixels = torch.stack([noise(number, *shape) for number in numbers])
        return {name: pixels} | {key: torch.stack([value] * len(numbers)) for key, value in more.items()}

    return pictures


def tiles(size: int, most: int = 3) -> Pictures:
    """Any-resolution pictures: an overview and tiles; the even ones are wide (3 views), the odd ones tall (3)."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), most, 3, size, size)
        for row, number in enumerate(numbers):
            pixels[row, :3] = noise(number, 3, 3, size, size)
        part = size // 16
        sizes = [(13 * part, 30 * part) if number % 2 == 0 else (32 * part, 10 * part) for number in numbers]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return pictures


def packed(shape: Shape, channels: int, grid: str = "image_grid_thw", axes: int = 3, **more: Any) -> Pictures:
    """Patches of all pictures in one list, with the grid of each: `channels` values per patch."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        grids = [(1, *shape.grids[number % 2])[-axes:] for number in numbers]
        rows = [noise(number, shape.grids[number % 2][0] * shape.grids[number % 2][1], channels) for number in numbers]
        inputs = {"pixel_values": torch.cat(rows), grid: torch.tensor(grids)}
        return inputs | {key: torch.stack([value] * len(numbers)) for key, value in more.items()}

    return pictures


def patches(shape: Shape, side: int, grid: str = "image_grid_thw") -> Pictures:
    """As `packed`, each patch a square: f[N, 3, side, side]."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        inputs = packed(shape, 3 * side * side, grid)(numbers)
        inputs["pixel_values"] = inputs["pixel_values"].view(-1, 3, side, side)
        return inputs

    return pictures


def views(size: int) -> Pictures:
    """Two views of one picture in even rows; odd ones have a view, then a blank one that the model drops."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.stack([noise(number, 2, 3, size, size) for number in numbers])
        for row, number in enumerate(numbers):
            pixels[row, 1] *= number % 2 == 0
        mask = torch.ones(len(numbers), 2, size, size, dtype=torch.bool)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    return pictures


def framed(side: int) -> Pictures:
    """Pictures of several sizes in one frame, with their sizes; multiples of two patches of `side` pixels."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        sizes = [(6 * side, 4 * side) if number % 2 == 0 else (4 * side, 8 * side) for number in numbers]
        pixels = torch.zeros(len(numbers), 3, 8 * side, 8 * side)
        for row, (number, (height, width)) in enumerate(zip(numbers, sizes, strict=True)):
            pixels[row, :, :height, :width] = noise(number, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return pictures


def padded_patches(shape: Shape, channels: int) -> Pictures:
    """A row of patches per picture, padded to the longest of all pictures, with grids and a mask."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), shape.most, channels)
        mask = torch.zeros(len(numbers), shape.most, dtype=torch.long)
        for row, number in enumerate(numbers):
            count = shape.grids[number % 2][0] * shape.grids[number % 2][1]
            pixels[row, :count], mask[row, :count] = noise(number, count, channels), 1
        shapes = torch.tensor([shape.grids[number % 2] for number in numbers])
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    return pictures


def positioned_patches(shape: Shape, channels: int, name: str = "image_position_ids") -> Pictures:
    """A row of patches per picture with the (x, y) of each patch, -1 for padding."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), shape.most, channels)
        places = torch.full((len(numbers), shape.most, 2), -1)
        for row, number in enumerate(numbers):
            rows, columns = shape.grids[number % 2]
            pixels[row, : rows * columns] = noise(number, rows * columns, channels)
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
            places[row, : rows * columns] = grid
        return {"pixel_values": pixels, name: places}

    return pictures


def strips(side: int) -> Pictures:
    """The patches of all pictures side by side in one of a patch's height, f[1, 3, side, n * side], with grids."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        grids = [(8, 4) if number % 2 == 0 else (4, 12) for number in numbers]
        pixels = [
            noise(number, 3, side, rows * columns * side)
            for number, (rows, columns) in zip(numbers, grids, strict=True)
        ]
        return {"pixel_values": torch.cat(pixels, dim=-1)[None], "target_sizes": torch.tensor(grids)}

    return pictures


def local_views(size: int, side: int, grid: bool = False) -> Pictures:
    """An overview per picture, and two local views of each even one."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        counts = [2 if number % 2 == 0 else 4 for number in numbers]
        inputs: Inputs = {
            "pixel_values": torch.stack([noise(number, 3, size, size) for number in numbers]),
            "pixel_values_local": torch.cat(
                [noise(number, count, 3, side, side) for number, count in zip(numbers, counts, strict=True)]
            ),
            "num_local_patches": counts,
        }
        return inputs | ({"patches_grid": [[count // 2, 2] for count in counts]} if grid else {})

    return pictures


def flagged_views(size: int) -> Pictures:
    """Two views of one picture in even rows, one and a blank one in odd rows, with a flag per view."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        inputs = views(size)(numbers)
        inputs["pixel_attention_mask"] = inputs["pixel_values"].flatten(2).any(-1)
        return inputs

    return pictures


def rows_of_patches(channels: int, count: int = 16) -> Pictures:
    """As many patches of every picture, each a row of channels: f[n, count, channels]."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        return {"pixel_values": torch.stack([noise(number, count, channels) for number in numbers])}

    return pictures


def pixel_lists(shape: Shape, pixels: int) -> Pictures:
    """For each token of a picture its pixels, each with three colours: f[N, pixels, 3], with the grid of tokens."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        inputs = packed(shape, 3 * pixels)(numbers)
        return inputs | {"pixel_values": inputs["pixel_values"].view(-1, pixels, 3)}

    return pictures


def aspect_tiles(size: int, tiles: int = 2) -> Pictures:
    """One picture per row in up to two tiles, with the number of its aspect ratio and which tiles are real."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        mask = torch.ones(len(numbers), 1, tiles, dtype=torch.long)
        for row, number in enumerate(numbers):
            mask[row, 0, 1] = number % 2
        return {
            "pixel_values": torch.stack([noise(number, 1, tiles, 3, size, size) for number in numbers]),
            "aspect_ratio_ids": torch.tensor([[1 + number % 2] for number in numbers]),
            "aspect_ratio_mask": mask,
        }

    return pictures


def described_patches(shape: Shape, channels: int, name: str = "flattened_patches") -> Pictures:
    """A row of patches per picture, each after its row and column from 1: f[n, most, 2 + channels].

    Zeros fill the rows of smaller pictures.
    """

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), shape.most, 2 + channels)
        for place, number in enumerate(numbers):
            rows, columns = shape.grids[number % 2]
            grid = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).float()
            pixels[place, : rows * columns] = torch.cat([grid, noise(number, rows * columns, channels)], dim=1)
        return {name: pixels}

    return pictures


def pooled_crops(side: int = 8, crops: int = 2) -> Pictures:
    """Crops of 4 x 4 patches as pixels, and for each token the patches it is pooled from (-1: none)."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        count = 16 * crops
        pooling = [torch.arange(count).view(-1, 4) + place * count for place in range(len(numbers))]
        return {
            "pixel_values": torch.cat([noise(number, crops, 16, 3 * side * side) for number in numbers]),
            "image_token_pooling": torch.cat(pooling),
            "image_grids": torch.tensor([[2, 2, 2, 2]] * len(numbers)),
            "image_num_crops": torch.tensor([crops] * len(numbers)),
        }

    return pictures


def _by_row(inputs: Inputs, *names: str) -> Inputs:
    """Pictures by row, f[B, 2, ...]: a row with one picture has a blank one too, as processors pad a batch."""
    rows = {name: inputs[name].view(len(inputs["input_ids"]), -1, *inputs[name].shape[1:]) for name in names}
    return {name: torch.cat([each, torch.zeros_like(each)], dim=1)[:, :2] for name, each in rows.items()}


def _seen(inputs: Inputs, image: int) -> torch.Tensor:
    """Which of two pictures of its row a token sees: those whose token came before, bool[B, S, 2]."""
    return (inputs["input_ids"] == image).cumsum(dim=1)[:, :, None] > torch.arange(2)


def seen_tiles(image: int) -> Callable[[Inputs], Inputs]:
    """Pictures in tiles by row, and which tiles a token attends to, i64[B, S, 2, tiles]."""

    def beside(inputs: Inputs) -> Inputs:
        squeezed = {name: inputs[name].squeeze(1) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        rows = _by_row(inputs | squeezed, *squeezed)
        rows["aspect_ratio_mask"][..., 0] = 1
        return rows | {
            "cross_attention_mask": _seen(inputs, image)[..., None].long() * rows["aspect_ratio_mask"][:, None]
        }

    return beside


def seen_pictures(image: int) -> Callable[[Inputs], Inputs]:
    """Pictures by row, and which of them a token attends to, i64[B, S, 2]."""

    def beside(inputs: Inputs) -> Inputs:
        return _by_row(inputs, "pixel_values") | {"image_attention_mask": _seen(inputs, image).long()}

    return beside


def marked(image: int) -> Callable[[Inputs], Inputs]:
    """Which tokens stand for pictures, as an input of its own."""

    def beside(inputs: Inputs) -> Inputs:
        return {"image_embeds_position_mask": (inputs["input_ids"] == image).long()}

    return beside


def questions(inputs: Inputs) -> Inputs:
    """The question that a Q-Former reads beside every picture."""
    ids = torch.randint(3, 80, (len(inputs["pixel_values"]), 6), generator=torch.Generator().manual_seed(7))
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def boxes(inputs: Inputs) -> Inputs:
    """Where each token is on its page: left, top, right and bottom, f[B, S, 4]."""
    places = torch.rand(*inputs["input_ids"].shape, 4, generator=torch.Generator().manual_seed(8))
    return {"bbox": places.sort(dim=-1).values}


def encoder_only(inputs: Inputs) -> Inputs:
    """A prompt of nothing but the picture; where pictures are rows of patches, with a mask of those that are real."""
    patches = inputs.get("flattened_patches")
    mask = None if patches is None else patches.any(dim=-1).long()
    return {"input_ids": None, "attention_mask": mask}
