"""Overlays of the visual tokens that each decoder layer still sees, as cells drawn over the picture.

Visual tokens of one picture come in raster order. If the processor returns the grid (`image_grid_thw`) it is that grid
divided by the merge size; a fixed-size tower has a square one. Tokens without a single grid (tiles, several pictures)
are counted but not drawn.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from PIL import Image

from qpcompile.capture.chat import about_picture, chat_inputs
from qpcompile.errors import CalibrationError
from qpcompile.picture import read_picture
from qpcompile.recipe.plan import Plan
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.model_inputs import new_tokens

Sample = tuple[str | PathLike[str] | Image.Image, str]

ANSWER_TOKENS = 24
# Longest side of an embedded picture, in pixels.
_LONGEST_SIDE = 448


@dataclass(frozen=True)
class Panel:
    """Consecutive layers that see the same visual tokens; `kept` are raster indices of `total` tokens."""

    first_layer: int
    last_layer: int
    kept: tuple[int, ...]
    total: int

    @property
    def title(self) -> str:
        if self.first_layer == self.last_layer:
            return f"layer {self.first_layer}"
        return f"layers {self.first_layer} to {self.last_layer}"


@dataclass(frozen=True)
class Overlay:
    """One sample: the picture as the model sees it, its token grid (None: not drawn), and the kept tokens per layer."""

    question: str
    answer: str
    picture: str
    width: int
    height: int
    grid: tuple[int, int] | None
    panels: tuple[Panel, ...]

    def dropped_path(self, panel: Panel) -> str:
        """SVG path data that covers the cells of the tokens a panel does not see, in pixels of the picture."""
        return "" if self.grid is None else cells_path(_dropped(panel), self.grid, self.width, self.height)

    def kept_border(self, panel: Panel) -> str:
        """SVG path data of the lines between kept and dropped cells, in pixels of the picture."""
        return "" if self.grid is None else border_path(_dropped(panel), self.grid, self.width, self.height)


def overlays(machine: Machine, processor: Any, samples: Iterable[Sample]) -> list[Overlay]:
    """Run every (picture, question) and collect the kept tokens.

    Raises CalibrationError for an unreadable picture and for a model without a processor.
    """
    if processor is None:
        raise CalibrationError(
            "sample pictures need a processor, and this model has none",
            where="report samples",
            do="compile with processor=..., or write the report without samples",
        )
    if states := next((cut.states for cut in machine.program.plan.cuts if cut.states is not None), None):
        raise CalibrationError(
            f"kept tokens are drawn on the picture tokens of a prompt, and those of this model are rows of {states}",
            where="report samples",
            do="write the report without samples; compiled.kept_tokens(**inputs) has the numbers",
        )
    return [_overlay(machine, processor, *sample, f"report sample {number}") for number, sample in enumerate(samples)]


def token_grid(config: Any, inputs: Mapping[str, Any], count: int) -> tuple[int, int] | None:
    """(rows, columns) of the `count` visual tokens of the one picture in `inputs`; None if they form no single grid."""
    sizes = inputs.get("image_grid_thw")
    if isinstance(sizes, torch.Tensor):
        merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        if sizes.shape[0] != 1:
            return None
        frames, height, width = (int(size) for size in sizes[0])
        grid = height // merge, width // merge
        return grid if frames == 1 and grid[0] * grid[1] == count else None
    pixels = inputs.get("pixel_values")
    one = isinstance(pixels, torch.Tensor) and pixels.ndim >= 4 and math.prod(pixels.shape[:-3]) == 1
    side = math.isqrt(count)
    return (side, side) if one and count and side * side == count else None


def panels(plan: Plan, kept: Mapping[int, torch.Tensor], visual: torch.Tensor) -> tuple[Panel, ...]:
    """The kept tokens of one row, per run of consecutive layers.

    Args:
        kept: cut layer -> i64[N], positions in the prompt, -1 for no token.
        visual: i64[V], positions of the visual tokens in the prompt, ascending.
    """
    raster = {position: index for index, position in enumerate(visual.tolist())}
    seen = tuple(range(len(raster)))
    first, found = 0, []
    for layer in sorted(kept):
        found.append(Panel(first, layer, seen, len(raster)))
        seen = tuple(raster[position] for position in kept[layer].tolist() if position in raster)
        first = layer + 1
    found.append(Panel(first, len(plan.layers) - 1, seen, len(raster)))
    return tuple(found)


def cells_path(cells: Iterable[int], grid: tuple[int, int], width: int, height: int) -> str:
    """SVG path data of grid cells (raster indices) over a picture of `width` x `height`; runs in a row are merged."""
    rows, columns = grid
    runs: list[list[int]] = []
    for cell in sorted(cells):
        if runs and cell == runs[-1][1] and cell % columns:
            runs[-1][1] += 1
        else:
            runs.append([cell, cell + 1])
    return "".join(_box(start, end, columns, width / columns, height / rows) for start, end in runs)


def border_path(cells: Iterable[int], grid: tuple[int, int], width: int, height: int) -> str:
    """SVG path data of the lines between grid cells (raster indices) and all others; the picture's rim has none."""
    rows, columns = grid
    inside, across, down = set(cells), width / columns, height / rows
    lines = []
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        if column + 1 < columns and (cell in inside) != (cell + 1 in inside):
            lines.append(f"M{(column + 1) * across:g} {row * down:g}v{down:g}")
        if row + 1 < rows and (cell in inside) != (cell + columns in inside):
            lines.append(f"M{column * across:g} {(row + 1) * down:g}h{across:g}")
    return "".join(lines)


def _dropped(panel: Panel) -> list[int]:
    kept = set(panel.kept)
    return [index for index in range(panel.total) if index not in kept]


def _box(start: int, end: int, columns: int, across: float, down: float) -> str:
    """Cells `start` to `end` of one row, each `across` x `down` pixels."""
    length = (end - start) * across
    return f"M{start % columns * across:g} {start // columns * down:g}h{length:g}v{down:g}h{-length:g}z"


def seen_picture(picture: Image.Image, inputs: Mapping[str, Any], processor: Any) -> Image.Image:
    """The picture after the processor's resizing and cropping if its output still is an image, else unchanged."""
    pixels, settings = inputs.get("pixel_values"), getattr(processor, "image_processor", None)
    mean, deviation = getattr(settings, "image_mean", None), getattr(settings, "image_std", None)
    if not isinstance(pixels, torch.Tensor) or pixels.ndim < 4 or math.prod(pixels.shape[:-3]) != 1:
        return picture
    image = pixels.reshape(pixels.shape[-3:]).float()
    if getattr(settings, "do_normalize", False) and mean and deviation:
        image = image * torch.tensor(deviation)[:, None, None] + torch.tensor(mean)[:, None, None]
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), "RGB")


def _overlay(
    machine: Machine, processor: Any, source: str | PathLike[str] | Image.Image, question: str, place: str
) -> Overlay:
    picture = read_picture(source, where=place)
    inputs = chat_inputs(processor, [about_picture(picture, question)], [place])
    ids = inputs["input_ids"][0]
    visual = (ids == machine.host.config.image_token_id).nonzero()[:, 0]
    kept = {layer: positions[0] for layer, positions in machine.kept_tokens(inputs).items()}
    answer = new_tokens(inputs, machine.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False))[0]
    seen = seen_picture(picture, inputs, processor)
    data, width, height = _embedded(seen)
    return Overlay(
        question=question,
        answer=processor.decode(answer, skip_special_tokens=True).strip(),
        picture=data,
        width=width,
        height=height,
        grid=token_grid(machine.host.config, inputs, len(visual)),
        panels=panels(machine.program.plan, kept, visual),
    )


def _embedded(picture: Image.Image) -> tuple[str, int, int]:
    """A picture as a data URL, with its width and height; large ones are downscaled."""
    small = picture.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    target = io.BytesIO()
    small.save(target, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}", small.width, small.height
